"""Save and load a student: a run's model directory, an imported model or an ``hf`` export.

A model directory has one safetensors file per part that learned:

    RUN/model/
      config.yaml                  the run, resolved: which base models the rest comes from
      mole_encoder.safetensors     experts and routers of the vision tower
      mm_projector.safetensors
      encoder_adapter.safetensors  teacher adapters or student heads; used in training only
      vision_tower.safetensors     base weights of the tower, after finetune
      language_model.safetensors   language model and lm_head, after finetune
      language_model_lora/         its adapter instead, with student.language_model_lora
      (tokenizer files)

A part without a file is its base, unchanged. Nothing here unpickles, and no code of a directory
runs.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from movekd.config import read_yaml, validate
from movekd.corpus.transforms import Geometry
from movekd.errors import ConfigError, WeightsError, shorten
from movekd.student.config import PromptFormat, StudentConfig
from movekd.student.hf_loading import loading, require_whole
from movekd.student.language_loading import is_in_4bit
from movekd.student.language_lora import (
    LORA_DIR,
    LORA_FILE,
    LORA_PART,
    adapter_parameters,
    add_adapter,
    base_name,
    has_adapter,
    is_adapter,
    merging,
    write_adapter_config,
)
from movekd.student.llava import LLAVA_CLASSES, llava_class
from movekd.student.llava_keys import check_llava
from movekd.student.model_files import read_about, require_as_recorded
from movekd.student.provenance import imported_from
from movekd.student.tensor_files import describe_difference, read_json
from movekd.student.tokenizer import load_tokenizer
from movekd.student.towers import EXPORTED_TYPES
from movekd.student.vlm import Student, build_encoder, build_vlm

PART_FILES = {
    "mole": "mole_encoder.safetensors",
    "projector": "mm_projector.safetensors",
    "vision_tower": "vision_tower.safetensors",
    "language_model": "language_model.safetensors",
}
BASE_KEYS = ("vision_tower", "language_model")
"""Keys of `student` that name a base model."""
ADAPTERS_FILE = "encoder_adapter.safetensors"
CONFIG_FILE = "config.yaml"
ABOUT_FILE = "movekd.json"
"""In every export: the prompt format and how images become pixels."""


def part_of(name: str) -> str:
    """Return the part that a parameter of the vision-language model belongs to."""
    if ".mole_" in name:
        return "mole"
    if "multi_modal_projector" in name or "image_newline" in name:
        return "projector"
    return "vision_tower" if "vision_tower" in name else "language_model"


def part_parameters(vlm: nn.Module, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of everything in a part; its file has the same names."""
    if part == LORA_PART:
        yield from adapter_parameters(vlm).items()
        return
    for name, parameter in vlm.named_parameters():
        if part_of(name) == part and not is_adapter(name):
            yield base_name(name) if part == "language_model" else name, parameter


def save_parts(directory: Path, vlm: nn.Module, parts: list[str]) -> None:
    """Write one file for each part; ``language_model_lora`` is the adapter of the language model.

    Raises:
        WeightsError: a weight is NaN or infinite; that part is not written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part == LORA_PART:
            has_new_base = "language_model" in parts
            write_adapter_config(vlm, directory / LORA_DIR, names_base=not has_new_base)
        path = directory / (LORA_FILE if part == LORA_PART else PART_FILES[part])
        _save(path, part_parameters(vlm, part))


def load_parts(
    directory: Path, vlm: nn.Module, parts: Iterable[str] = tuple(PART_FILES)
) -> list[str]:
    """Load those of ``parts`` that have a file into the model; return their names.

    An adapter of the language model belongs to the part ``language_model``. A model without one
    gets it merged into its weights.

    Raises:
        WeightsError: names or shapes are not those of the model, or the files are not those that
            movekd wrote.
        ConfigError: weights are to change that are in 4 bit.
    """
    parts = tuple(parts)
    require_as_recorded(directory)
    loaded = []
    for part in parts:
        path = directory / PART_FILES[part]
        if path.exists():
            if part == "language_model":
                _require_not_4bit(vlm, path)
            load_exact(path, dict(part_parameters(vlm, part)))
            loaded.append(part)
    if "language_model" in parts and (directory / LORA_FILE).exists():
        loaded.append(_load_adapter(directory, vlm))
    if not loaded:
        raise WeightsError(
            f"{directory} holds none of {', '.join(PART_FILES.values())}; expected the `model` "
            "folder of a run that `movekd train` finished."
        )
    return loaded


def _load_adapter(directory: Path, vlm: nn.Module) -> str:
    """Load the language model's adapter, or merge it; return the part that has changed."""
    path = directory / LORA_FILE
    if has_adapter(vlm):
        load_exact(path, adapter_parameters(vlm))
        return LORA_PART
    _require_not_4bit(vlm, path, ", or student.language_model_lora as that run had it")
    source = directory / CONFIG_FILE
    keys = validate(StudentConfig, read_run_config(source).get("student", {}), str(source))
    if keys.language_model_lora is None:
        raise WeightsError(
            f"{path} is an adapter, but {source} has no student.language_model_lora, which says "
            "how it is scaled; expected both or neither. Restore the file that is not the run's."
        )
    with merging(vlm, keys.language_model_lora):
        load_exact(path, adapter_parameters(vlm))
    return "language_model"


def _require_not_4bit(vlm: Any, path: Path, otherwise: str = "") -> None:
    if is_in_4bit(vlm):
        raise ConfigError(
            f"{path} would change the language model's weights, which student.load_in_4bit holds "
            "fixed in 4 bit; expected no more than an adapter beside them. Set load_in_4bit: "
            f"false{otherwise}."
        )


def save_adapters(directory: Path, adapters: nn.Module) -> None:
    """Write the teacher adapters or student heads."""
    if parameters := dict(adapters.named_parameters()):
        _save(directory / ADAPTERS_FILE, parameters.items())


def load_adapters(directory: Path, adapters: nn.Module, optional: str | None = None) -> None:
    """Load the teacher adapters or student heads, if folder and model have them.

    Heads whose names start with ``optional`` may be missing on either side.
    """
    parameters = dict(adapters.named_parameters())
    if parameters and (directory / ADAPTERS_FILE).exists():
        load_exact(directory / ADAPTERS_FILE, parameters, optional)


def load_exact(
    path: Path, parameters: dict[str, nn.Parameter], optional: str | None = None
) -> None:
    """Copy a safetensors file into parameters with exactly its names and shapes.

    Names that start with ``optional`` count only if both sides have some.

    Raises:
        WeightsError: the file is damaged, or names or shapes differ.
    """
    try:
        if not path.is_file():  # a FIFO would wait for its writer
            raise OSError("it is no regular file")
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}.") from None
    if optional is not None:
        sides: list[dict[str, Any]] = [tensors, parameters]
        if len({any(name.startswith(optional) for name in side) for side in sides}) == 2:
            tensors, parameters = (
                {n: value for n, value in side.items() if not n.startswith(optional)}
                for side in sides
            )
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in named.items()}
        for named in (tensors, parameters)
    )
    if difference := describe_difference(found, expected):
        raise WeightsError(
            f"{path} does not fit the model: {difference}. Use the config.yaml that was saved with "
            "it."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


@dataclass(frozen=True)
class TrainedStudent:
    """The model of a finished run, its prompt format and how its images become pixels.

    Attributes:
        student: the model, frozen, in evaluation mode.
        prompt: format of the questions.
        geometry: how images become square.
        directory: the folder with the files of its parts.
        run: the resolved config, as YAML holds it.
    """

    student: Student
    prompt: PromptFormat
    geometry: Geometry
    directory: Path
    run: dict[str, Any]


def load_student(
    directory: Path,
    device: str = "cpu",
    *,
    takes_encoder: bool = False,
    language_lora: Literal["as trained", "merged", "adapter"] = "as trained",
) -> TrainedStudent:
    """Return the trained model of a run, frozen and in evaluation mode.

    Args:
        directory: a run's output, or its ``model`` folder; what `movekd import` wrote; or an
            export of format hf.
        device: device of the weights.
        takes_encoder: accept an encoder of stage distill, which has no tokenizer.
        language_lora: merged puts the language model's adapter into the weights of its base;
            adapter leaves it beside them. With both, the weights have their own dtype, also if the
            run held them in 4 bit.

    Raises:
        WeightsError: the directory holds no finished model.
        ConfigError: the directory holds only an encoder, and ``takes_encoder`` is false.
    """
    model_dir = directory / "model" if (directory / "model").is_dir() else directory
    if not (model_dir / CONFIG_FILE).exists() and (model_dir / "config.json").exists():
        return load_export(model_dir, device, merges_lora=language_lora == "merged")
    if not (model_dir / CONFIG_FILE).exists():
        raise WeightsError(
            f"{directory} holds no finished run (no model/{CONFIG_FILE}); expected the --output of "
            "a `movekd train` that ended."
        )
    source = str(model_dir / CONFIG_FILE)
    content = read_run_config(model_dir / CONFIG_FILE)
    config = validate(StudentConfig, content.get("student", {}), source)
    geometry = content.get("data", {}).get("geometry")
    if geometry not in get_args(Geometry) or config.prompt is None:
        raise WeightsError(
            f"{source} lacks data.geometry or student.prompt; it was not written "
            "by movekd, or was edited since."
        )
    build = build_encoder if takes_encoder and config.language_model is None else build_vlm
    bases: dict[str, Any] = {key: local_base(getattr(config, key), model_dir) for key in BASE_KEYS}
    if language_lora != "as trained":
        bases["load_in_4bit"] = False
    if language_lora == "merged":
        bases["language_model_lora"] = None
    student = build(config.model_copy(update=bases | {"attn_implementation": None}))
    loaded = load_parts(model_dir, student.vlm)
    if config.language_model_lora is not None and {LORA_PART, "language_model"}.isdisjoint(loaded):
        raise WeightsError(
            f"{model_dir} lacks {LORA_FILE}, which its {CONFIG_FILE} promises; expected the files "
            "that `movekd train` wrote. Restore it."
        )
    student.vlm.eval().requires_grad_(False).to(device)
    if (mark := imported_from(student.vlm)) is not None:
        content.setdefault("imported", mark)  # a run that started from an imported model
    return TrainedStudent(student, config.prompt, geometry, model_dir, content)


def read_run_config(path: Path) -> dict[str, Any]:
    """Return the content of a run's config.yaml, as it is; its sections are mappings or null.

    Raises:
        ConfigError: the file is missing, is no YAML, or a section is something else.
    """
    content = read_yaml(path)
    sections = ("student", "data", "distill", "training")
    for key in (*sections, "student.mole", "student.language_model_lora"):
        value: Any = content
        for part in key.split("."):
            value = (value or {}).get(part)
        if not isinstance(value, dict | None):
            raise ConfigError(
                f"{path}: {key} is {shorten(repr(value), 80)}; expected a mapping, as `movekd "
                "train` writes it. Restore the file, or train again."
            )
    return content


def load_export(
    directory: Path, device: str = "cpu", *, merges_lora: bool = False
) -> TrainedStudent:
    """Return the student of an export, frozen and in evaluation mode.

    Only movekd's own code runs, whatever code lies in the directory. ``merges_lora`` merges an
    adapter that lies beside the weights.

    Raises:
        WeightsError: it is another kind of directory, or lacks a file.
    """
    keys = read_json(directory / "config.json")
    model_type = str(keys.get("model_type"))
    if model_type == "move_llava_llama":
        raise WeightsError(
            f"{directory} is a checkpoint of the released code; expected a model directory of "
            f"movekd. Make one of it: movekd import {directory} --output DIR."
        )
    if model_type in EXPORTED_TYPES.values():
        raise WeightsError(
            f"{directory} holds only a vision encoder, which answers no questions; expected a "
            "run, an imported model or an export of format hf."
        )
    if model_type not in LLAVA_CLASSES or not (directory / ABOUT_FILE).exists():
        raise WeightsError(
            f"{directory} holds a model of type '{shorten(model_type, 80)}'"
            f"{'' if (directory / ABOUT_FILE).exists() else f' and no {ABOUT_FILE}'}; expected an "
            "export of `movekd export --format hf`."
        )
    about, run = read_about(directory / ABOUT_FILE)
    require_as_recorded(directory)
    with loading(str(directory), "the model in"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        projector = str(keys.get("projector_type", "mlp2x_gelu"))
        vlm, info = llava_class(model_type, projector, config.vision_config).from_pretrained(
            directory,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    require_whole(info, str(directory), "the model in")
    tokenizer = load_tokenizer(directory)
    check_llava(vlm, tokenizer, directory)
    if (lora := about.language_model_lora) is not None:
        with merging(vlm, lora) if merges_lora else nullcontext(add_adapter(vlm, lora)):
            load_exact(directory / LORA_FILE, adapter_parameters(vlm, in_llava=True))
    vlm.eval().requires_grad_(False).to(torch.device(device))
    student = Student(vlm, tokenizer, about.image_mean, about.image_std)
    return TrainedStudent(student, about.prompt, about.geometry, directory, run)


def local_base(base: Any, model_dir: Path) -> Any:
    """Return a base model's name, or its path if it lies in the folder of an imported model."""
    is_here = isinstance(base, str) and base.startswith("base/") and (model_dir / base).is_dir()
    return str(model_dir / base) if is_here else base


def _save(path: Path, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters}
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise WeightsError(
            f"{path.name} was not written: {len(bad)} of its {len(tensors)} tensors hold values "
            f"that are not finite ({bad[0]}); expected finite weights."
        )
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)
