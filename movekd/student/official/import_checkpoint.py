"""Import a released checkpoint: write a model directory for ask, evaluate, train and export.

    OUT/model/
      config.yaml                  as of a run; the base models are those below
      base/vision_tower/           the tower's base weights, a CLIPVisionModel of transformers
      base/language_model/         a LlamaForCausalLM, and a tokenizer that knows <image>
      mole_encoder.safetensors     experts and routers, stacked
      mm_projector.safetensors
      encoder_adapter.safetensors  where the checkpoint holds adapters
      official/                    its config.json and tokenizer, unchanged, for an export

Every name and shape is checked before anything is written. Values are copied unchanged, one tensor
at a time. ``export_checkpoint`` is the inverse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from transformers import LlamaConfig

from movekd.config import validate
from movekd.errors import ConfigError, WeightsError
from movekd.student.checkpoint import ABOUT_FILE, CONFIG_FILE, PART_FILES, part_of
from movekd.student.config import StudentConfig
from movekd.student.model_files import check_model_files
from movekd.student.official.imported_model import (
    write_adapters,
    write_language_model,
    write_originals,
    write_part,
    write_tower,
)
from movekd.student.official.schema import (
    ASPECT_RATIOS,
    CLIP_L_336,
    OLD_BUFFERS,
    ORIGINALS,
    STAGE_1_FILES,
    check_weights,
    clip_config,
    common_dtype,
    experts_of,
    require_supported,
    skeleton,
    student_config,
    text_config,
)
from movekd.student.official.state_dict import ADAPTERS
from movekd.student.provenance import IMPORTED_KEY
from movekd.student.tensor_files import (
    INDEX_FILES,
    SINGLE_FILES,
    TensorFiles,
    open_checkpoint,
    read_json,
)
from movekd.student.tokenizer import forget_calls, load_tokenizer


@dataclass(frozen=True)
class Imported:
    """What the import found."""

    directory: Path
    stage: str
    num_tensors: int
    adapters: tuple[str, ...]
    dtype: str


def import_official(
    source: Path,
    out: Path,
    *,
    vision_tower: str | None = None,
    language_model: str | None = None,
    tokenizer: str | None = None,
) -> Imported:
    """Turn a released checkpoint, or the files of stage 1, into a model directory of movekd.

    Args:
        source: directory of a ``move_llava_llama`` checkpoint, or with the files of stage 1.
        out: the directory; ``out/model`` is written.
        vision_tower: hub id or directory of the CLIP, instead of the one that config.json names.
        language_model: hub id or directory of the language model; only stage 1 needs it.
        tokenizer: hub id or directory of a fast tokenizer, where the checkpoint has none.

    Raises:
        WeightsError: weights are missing, unexpected, of another shape, or not plain tensors.
        ConfigError: config.json describes what movekd does not compute.
    """
    if not source.is_dir():
        raise WeightsError(f"{source} is no directory; expected a released checkpoint.")
    check_model_files(source)
    stage_1 = {part: source / name for part, name in STAGE_1_FILES.items()}
    if not (source / "config.json").exists() and not any(p.exists() for p in stage_1.values()):
        raise WeightsError(
            f"{source} holds neither a config.json nor {', '.join(STAGE_1_FILES.values())}; "
            "expected a released checkpoint, or the files of its stage 1."
        )
    is_whole = any((source / name).exists() for name in INDEX_FILES + SINGLE_FILES)
    if stage_1["mole"].exists() and not is_whole:
        return _import_stage_1(source, out / "model", stage_1, vision_tower, language_model)
    return _import_checkpoint(source, out / "model", vision_tower, tokenizer)


def _import_checkpoint(
    source: Path, model_dir: Path, vision_tower: str | None, tokenizer_source: str | None
) -> Imported:
    keys = read_json(source / "config.json")
    require_supported(keys, source / "config.json")
    tensors = open_checkpoint(source)
    tower_source = vision_tower or str(keys.get("mm_vision_tower"))
    vision_config = clip_config(tower_source)
    language = text_config(keys)
    student = _with_export_settings(source, student_config(keys, common_dtype(tensors), "v1"))
    parameters = dict(skeleton(vision_config, language, student).named_parameters())
    buffers = [name for name in tensors if name.endswith(OLD_BUFFERS)]
    adapters = check_weights(tensors, parameters, buffers, vision_config, source)
    tokenizer = load_tokenizer(tokenizer_source or source, language)

    base = model_dir / "base"
    for config in (vision_config, language):
        setattr(config, IMPORTED_KEY, _source(source, keys))
    write_tower(base / "vision_tower", vision_config, tower_source, parameters, tensors)
    write_language_model(base / "language_model", language, tokenizer, parameters, tensors)
    forget_calls(tokenizer).save_pretrained(model_dir)
    write_originals(model_dir / ORIGINALS, source, tensors, buffers, student.dtype)
    return _write_parts(model_dir, source, student, "finetune", keys, adapters, parameters, tensors)


def _import_stage_1(
    source: Path,
    model_dir: Path,
    files: Mapping[str, Path],
    vision_tower: str | None,
    language_model: str | None,
) -> Imported:
    if language_model is None:
        raise ConfigError(
            f"{source} holds the files of stage 1, which leave the language model as it was; give "
            "its hub id or directory with --language-model (the release took lmsys/vicuna-7b-v1.5)."
        )
    has_config = (source / "config.json").exists()
    keys = read_json(source / "config.json") if has_config else {}
    tensors = TensorFiles({path: None for path in files.values() if path.exists()})
    tower_source = vision_tower or str(keys.get("mm_vision_tower") or CLIP_L_336)
    vision_config = clip_config(tower_source)
    projected = [n for n in tensors if n.endswith("mm_projector.0.bias")]
    hidden_size = tensors.shape(projected[0])[0] if projected else 64
    language = LlamaConfig(
        vocab_size=2, hidden_size=hidden_size, num_hidden_layers=0, num_attention_heads=1
    )
    keys = {"moe": experts_of(tensors)} | keys
    student = student_config(keys, common_dtype(tensors), "plain").model_copy(
        update={"vision_tower": tower_source, "language_model": language_model}
    )
    student = _with_export_settings(source, student)
    learned = {
        name: parameter
        for name, parameter in skeleton(vision_config, language, student).named_parameters()
        if part_of(name) in ("mole", "projector")
    }
    adapters = check_weights(tensors, learned, [], vision_config, source)
    return _write_parts(model_dir, source, student, "pretrain", keys, adapters, learned, tensors)


def _with_export_settings(source: Path, student: StudentConfig) -> StudentConfig:
    """Return the config with the prompt and pixel statistics of an export's movekd.json.

    A released checkpoint has none: Vicuna's prompt, and the tower's statistics.
    """
    if not (source / ABOUT_FILE).is_file():
        return student
    about = read_json(source / ABOUT_FILE)
    named = {key: about[key] for key in ("prompt", "image_mean", "image_std") if key in about}
    return validate(
        StudentConfig, student.model_dump(mode="json") | named, str(source / ABOUT_FILE)
    )


def _write_parts(
    model_dir: Path,
    source: Path,
    student: StudentConfig,
    stage: str,
    keys: Mapping[str, Any],
    adapters: list[str],
    parameters: Mapping[str, Tensor],
    tensors: TensorFiles,
) -> Imported:
    """Write what learned, and the config.yaml that makes the directory a run of ``stage``."""
    model_dir.mkdir(parents=True, exist_ok=True)
    for part in ("mole", "projector"):
        write_part(model_dir / PART_FILES[part], part, parameters, tensors)
    write_adapters(model_dir, {name: tensors[name] for name in adapters})
    here = {there: name for name, there in ADAPTERS.items()}
    teachers = tuple(sorted({here[name.split("_adapter_")[0]] for name in adapters}))
    aspect = keys.get("image_aspect_ratio") or "square"
    geometry = {there: here for here, there in ASPECT_RATIOS.items()}[aspect]
    layout = {"sam_layout": "released"} if "sam" in teachers else {}
    run = {
        "recipe": "official",
        "stage": stage,
        "student": student.model_dump(mode="json"),
        # CLIP, the anchor, has no adapter
        "distill": {"teachers": ["clip", *teachers]} | layout if teachers else None,
        "data": {"geometry": geometry},
        "imported": _source(source, keys),
    }
    text = yaml.safe_dump(run, sort_keys=False)
    (model_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
    number = "1" if stage == "pretrain" else "2"
    return Imported(model_dir.parent, number, len(tensors), teachers, student.dtype)


def _source(source: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "from": source.resolve().name,
        "vision_tower": keys.get("mm_vision_tower"),
        "language_model": keys.get("_name_or_path"),
    }
