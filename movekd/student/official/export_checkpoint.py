"""Export a run as files of the released code.

    stage 1                                   stage 2
      mm_projector.bin                          config.json      model_type move_llava_llama
      mole_encoder.bin                          model*.safetensors and their index
      encoder_adapter.bin                       tokenizer files
      config.json

``import_checkpoint`` is the inverse. ``state_dict`` has the names; docs/compatibility.md prints
them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from movekd.config import validate
from movekd.errors import ConfigError, WeightsError, shorten
from movekd.student.checkpoint import (
    ADAPTERS_FILE,
    CONFIG_FILE,
    PART_FILES,
    TrainedStudent,
    local_base,
)
from movekd.student.config import StudentConfig
from movekd.student.language_lora import LORA_FILE
from movekd.student.official.schema import (
    ARCHITECTURE,
    ASPECT_RATIOS,
    BUFFERS_FILE,
    DTYPES_FILE,
    MODEL_TYPE,
    ORIGINALS,
    PROJECTOR_TYPE,
    STAGE_1_FILES,
    TEXT_KEYS,
)
from movekd.student.official.state_dict import (
    PROJECTOR,
    official_adapters,
    official_state_dict,
    require_official,
)
from movekd.student.parameters import mole_layers
from movekd.student.projector import projector_type
from movekd.student.provenance import base_models, imported_from, public_name
from movekd.student.tensor_files import TensorFiles, read_json, write_bin, write_shards
from movekd.student.tokenizer import IMAGE_TOKEN, copy_tokenizer_files
from movekd.student.tower_loading import own_image_size

EXPERT_WORDS = (".moe_down.", ".moe_up.", ".router.")
"""Each key of ``mole_encoder.bin`` holds one of these."""

_DTYPES = ("float32", "float16", "bfloat16")


def write_official(trained: TrainedStudent, directory: Path) -> list[str]:
    """Write a run in the format of the released code; return the names of the files.

    A run that trained no base weights gives the three files of stage 1; any other run gives a whole
    checkpoint. An imported checkpoint is restored bit for bit, with its config.json and tokenizer.

    Raises:
        ConfigError: the released code cannot compute or hold this student.
        WeightsError: the run's files are damaged.
    """
    vlm = trained.student.vlm
    if not (trained.directory / CONFIG_FILE).exists():
        raise ConfigError(
            f"{trained.directory} is an export already, which does not say what it started from; "
            "export the run or the imported model itself."
        )
    require_official(vlm)
    _require_own_image_size(trained)
    directory.mkdir(parents=True, exist_ok=True)
    adapters = adapters_of_run(trained.directory)
    originals = trained.directory / ORIGINALS
    config = official_config(trained)
    state = official_state_dict(vlm)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][: config["vocab_size"]]
    state = _as_released(state | adapters, originals)
    if has_base_weights(trained):
        write_shards(directory, state)
    else:
        write_stage_1(directory, state)
    _write_small_files(trained, config, originals, directory)
    return sorted(path.name for path in directory.iterdir())


def has_base_weights(trained: TrainedStudent) -> bool:
    """Return whether the student's base weights differ from the hub's.

    They do after training them, or if the run started from an imported checkpoint.
    """
    files = (PART_FILES["vision_tower"], PART_FILES["language_model"], LORA_FILE, "base")
    is_there = any((trained.directory / name).exists() for name in files)
    return is_there or imported_from(trained.student.vlm) is not None


def write_stage_1(directory: Path, state: Mapping[str, Tensor]) -> None:
    """Write the three files of stage 1 from an official state dict."""
    parts = {
        "projector": {n: t for n, t in state.items() if n.startswith(PROJECTOR)},
        "mole": {n: t for n, t in state.items() if any(word in n for word in EXPERT_WORDS)},
        "adapters": {n: t for n, t in state.items() if "_adapter_" in n},
    }
    for part, tensors in parts.items():
        if tensors:
            write_bin(directory / STAGE_1_FILES[part], tensors)


def official_config(trained: TrainedStudent) -> dict[str, Any]:
    """Return the config.json of an export; an imported checkpoint's is its own.

    Raises:
        ConfigError: the released code cannot compute this student.
    """
    original = trained.directory / ORIGINALS / "config.json"
    return read_json(original) if original.exists() else _config(trained)


def adapters_of_run(model_dir: Path) -> dict[str, Tensor]:
    """Return the official adapters of a run; heads of the revised recipe are left out."""
    path = model_dir / ADAPTERS_FILE
    if not path.exists():
        return {}
    tensors = TensorFiles({path: None})
    plain = {n: tensors[n] for n in tensors if n.split(".")[1:2] in (["channels"], ["tokens"])}
    return official_adapters(plain)


def _require_own_image_size(trained: TrainedStudent) -> None:
    """Refuse a tower of another image size: the released code builds it from its own config."""
    keys = trained.run.get("student") or {}
    if keys.get("image_size") is None:
        return
    config = validate(StudentConfig, keys, str(trained.directory))
    base = local_base(config.vision_tower, trained.directory)
    own = own_image_size(config.model_copy(update={"vision_tower": base}))
    if trained.student.image_size != own:
        raise ConfigError(
            f"the student looks at {trained.student.image_size} pixels (student.image_size), and "
            f"the released code builds its tower for the {own} pixels of the base. Export it as "
            "--format hf, or train without student.image_size."
        )


def _as_released(state: Mapping[str, Tensor], originals: Path) -> dict[str, Tensor]:
    """Return the weights with the dtypes and buffers of the imported checkpoint."""
    result = dict(state)
    if (originals / DTYPES_FILE).exists():
        for name, dtype in read_json(originals / DTYPES_FILE).items():
            if name not in result or dtype not in _DTYPES:
                raise WeightsError(
                    f"{originals / DTYPES_FILE} says that {shorten(name)} is {shorten(dtype)}; "
                    f"expected a weight of the model, and {', '.join(_DTYPES)}. Import the "
                    "checkpoint again."
                )
            result[name] = result[name].to(getattr(torch, dtype))
    if (originals / BUFFERS_FILE).exists():
        buffers = TensorFiles({originals / BUFFERS_FILE: None})
        result |= {name: buffers[name] for name in buffers}
    return result


def _write_small_files(
    trained: TrainedStudent, config: Mapping[str, Any], originals: Path, directory: Path
) -> None:
    if originals.is_dir():
        for path in sorted(originals.iterdir()):
            if path.name not in (DTYPES_FILE, BUFFERS_FILE):
                shutil.copyfile(path, directory / path.name)
        return
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    # the base's files: the student's have <image>, which would enlarge the vocabulary there
    source = str(trained.run["student"]["language_model"])
    imported = Path(source).parent.parent / ORIGINALS  # of model/base/language_model
    if imported.is_dir():
        source = str(imported)
    copy_tokenizer_files(source, directory)


def _config(trained: TrainedStudent) -> dict[str, Any]:
    """Return the config.json of a run that did not start from an imported checkpoint."""
    student, run = trained.student, trained.run
    vlm = student.vlm
    text = vlm.config.text_config
    experts = next(iter(mole_layers(vlm).values()))
    alpha = experts["lora_alpha"]
    alpha = int(alpha) if alpha == int(alpha) else alpha
    if trained.geometry not in ASPECT_RATIOS:
        raise ConfigError(
            f"the student was trained with geometry '{trained.geometry}'; LLaVA knows "
            f"{' and '.join(ASPECT_RATIOS)}. Export it as --format hf."
        )
    if (projector := projector_type(vlm)) != PROJECTOR_TYPE:
        raise ConfigError(
            f"the projector is a {projector}; the official format knows only {PROJECTOR_TYPE}. "
            "Export it as --format hf."
        )
    if vlm.config.projector_hidden_act != "gelu":
        raise ConfigError(
            f"the projector's activation is '{vlm.config.projector_hidden_act}'; the official "
            "format knows only gelu. Export it as --format hf."
        )
    rope = dict(getattr(text, "rope_parameters", None) or {})
    rope_theta, rope_type = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    config = {key: getattr(text, key, None) for key in TEXT_KEYS}
    num_rows = vlm.get_input_embeddings().num_embeddings
    image_id = student.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    bases = base_models(run)
    return config | {
        # <image> was put behind the vocabulary; the released code has no such token
        "vocab_size": image_id if image_id == num_rows - 1 else num_rows,
        "rope_theta": rope_theta,
        "rope_scaling": None if rope_type == "default" else {"type": rope_type} | rope,
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "torch_dtype": str(vlm.dtype).removeprefix("torch."),
        "use_cache": True,
        "_name_or_path": public_name(bases.get("language_model", "")),
        "mm_vision_tower": public_name(bases.get("vision_tower", "")),
        "mm_vision_select_layer": vlm.config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": PROJECTOR_TYPE,
        "mm_hidden_size": student.width,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": ASPECT_RATIOS[trained.geometry],
        "moe": {
            "moe_encoder": True,
            "moe_encoder_dense": False,
            "moe_encoder_lora_rank": experts["r"],
            "moe_encoder_lora_alpha": alpha,
            "moe_encoder_num_experts": experts["num_experts"],
        },
        "kd": {"kd_mode": run.get("distill") is not None},
    }
