"""Load what an earlier stage learned (`init_from`) into the model of this run.

The folder of a run holds only the parts that learned. They fit only the base models that they were
trained on, so the earlier run's config must name the same ones.
"""

import filecmp
from pathlib import Path
from typing import Any

from torch import nn

from movekd.distill.summary import head_name
from movekd.errors import ConfigError, WeightsError, shorten
from movekd.student.checkpoint import (
    BASE_KEYS,
    CONFIG_FILE,
    PART_FILES,
    load_adapters,
    load_parts,
    local_base,
    read_run_config,
)
from movekd.student.language_lora import LORA_FILE
from movekd.student.tower_loading import require_same_image_size
from movekd.student.vlm import Student
from movekd.train.config import TrainConfig
from movekd.train.trained_keys import ENCODER_PARTS

_MOLE_KEYS = ("teachers", "num_experts", "r", "lora_alpha", "use_gate")
_LORA_KEYS = ("r", "lora_alpha")


def check_init_from(config: TrainConfig) -> None:
    """Check, before any weights are read, that what ``config.init_from`` learned fits this run.

    Raises:
        ConfigError: that run has another base model, experts or an adapter of another kind, or
            weights that a 4-bit model cannot take.
        WeightsError: the folder holds no finished run.
    """
    directory = _model_dir(config)
    check_same_base(config, directory)
    files = [PART_FILES[part] for part in ENCODER_PARTS]
    if config.stage == "distill" and not any((directory / file).exists() for file in files):
        raise WeightsError(
            f"{directory} holds neither {' nor '.join(files)}; init_from of stage: distill expects "
            "a run that trained the encoder."
        )
    if config.student.load_in_4bit:
        _check_4bit(config, directory)


def load_init_from(config: TrainConfig, student: Student, adapters: nn.Module) -> list[str]:
    """Load what ``config.init_from`` learned; return the parts that were loaded.

    An adapter of the language model stays one with ``student.language_model_lora``; otherwise it is
    merged, and ``language_model`` is among the parts.

    Raises:
        WeightsError: the parts do not fit.
    """
    directory = _model_dir(config)
    parts = ENCODER_PARTS if config.stage == "distill" else tuple(PART_FILES)
    loaded = load_parts(directory, student.vlm, parts)
    load_adapters(directory, adapters, optional=head_name(""))
    return loaded


def check_same_base(config: TrainConfig, directory: Path) -> None:
    """Refuse to load parts that were trained on another base model.

    Raises:
        ConfigError: names the key, and its value in both runs.
    """
    if not (directory / CONFIG_FILE).exists():
        raise WeightsError(f"{directory} holds no {CONFIG_FILE}; it is not a finished run.")
    earlier: dict[str, Any] = read_run_config(directory / CONFIG_FILE).get("student") or {}
    now = config.student.model_dump(mode="json")
    bases = {
        key: local_base(earlier.get(key), directory.resolve())
        for key in BASE_KEYS
        if not (directory / PART_FILES[key]).exists()  # else all its weights come from there
    }
    expected = bases | {"vision_feature_layer": earlier.get("vision_feature_layer")}
    expected["projector_hidden_act"] = earlier.get("projector_hidden_act")
    if (directory / PART_FILES["projector"]).exists():  # an older run does not name its type
        expected["projector_type"] = earlier.get("projector_type", "mlp2x_gelu")
    if (directory / PART_FILES["mole"]).exists():
        old = earlier.get("mole") or {}
        expected["mole.experts"] = old.get("experts", "shared")  # an older run does not name it
        expected |= {f"mole.{key}": old.get(key) for key in _MOLE_KEYS}
    if (directory / PART_FILES["vision_tower"]).exists():
        require_same_image_size(earlier, config.student, str(config.init_from))
    if (directory / LORA_FILE).exists():
        old = earlier.get("language_model_lora") or {}
        expected |= {f"language_model_lora.{key}": old.get(key) for key in _LORA_KEYS}
    for key, then in expected.items():
        found: Any = now
        for part in key.split("."):
            found = (found or {}).get(part)
        if then is None or found is None or found == then:
            continue
        if key in bases and _is_same_folder(str(then), str(found)):
            continue
        then = shorten(then)
        raise ConfigError(
            f"init_from {config.init_from} was trained with student.{key} '{then}', and this run "
            f"has '{found}': its weights do not fit this model. Set "
            f"student.{key}: {then}."
        )


def _check_4bit(config: TrainConfig, directory: Path) -> None:
    """Refuse weights of an earlier run that would change those that are in 4 bit."""
    name = PART_FILES["language_model"]
    remedy = "Set load_in_4bit: false"
    if not (directory / name).exists():
        name = LORA_FILE
        remedy += ", or student.language_model_lora as that run had it"
        if config.student.language_model_lora is not None:
            return
    if (directory / name).exists():
        raise ConfigError(
            f"init_from {config.init_from} holds {name}, which would change the language model's "
            "weights, and student.load_in_4bit holds them fixed at those of "
            f"student.language_model. {remedy}."
        )


def _model_dir(config: TrainConfig) -> Path:
    assert config.init_from is not None
    directory = config.init_from / "model"
    if not directory.is_dir():
        raise WeightsError(
            f"init_from {config.init_from} holds no `model` folder; expected the --output of a "
            "`movekd train` that ended, or of `movekd import`."
        )
    return directory


def _is_same_folder(one: str, other: str) -> bool:
    """Return whether two paths are the same folder, or folders with identical weight files."""
    first, second = Path(one), Path(other)
    if not first.is_dir() or not second.is_dir():
        return False
    if first.resolve() == second.resolve():
        return True
    sizes = [{p.name: p.stat().st_size for p in f.glob("*.safetensors")} for f in (first, second)]
    if sizes[0] != sizes[1] or not sizes[0]:
        return False
    return all(filecmp.cmp(first / name, second / name, shallow=False) for name in sizes[0])
