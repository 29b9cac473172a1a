"""Load the encoder that a probe measures, without a language model.

Input: a run, an encoder export, a Hugging Face folder of a tower, or ``base:RUN``. Output: an
``Encoder``. Only movekd's and transformers' own code runs.

Legend: B images, C H W pixels, T tokens with prefix, D channels.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from movekd.config import validate
from movekd.corpus.transforms import Geometry
from movekd.errors import ConfigError, WeightsError
from movekd.evaluate.encoder.probed_model import EncoderTokens
from movekd.student.checkpoint import (
    ABOUT_FILE,
    CONFIG_FILE,
    PART_FILES,
    load_parts,
    load_student,
    local_base,
    read_run_config,
)
from movekd.student.config import StudentConfig
from movekd.student.export.hugging_face import exported_model
from movekd.student.hf_loading import loading, require_whole
from movekd.student.model_files import read_encoder_about, require_as_recorded
from movekd.student.tensor_files import read_json
from movekd.student.towers import EXPORTED_TYPES, num_prefix_tokens, tower_type
from movekd.student.vlm import Student, VisionEncoderOnly, build_encoder

_PARTS = ("mole", "vision_tower")
_BASE = "base:"


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder and how images become its pixels.

    Attributes:
        student: the encoder, in evaluation mode.
        geometry: how images become square.
        layer: hidden state that is read.
        identity: SHA-256 of the weights and of all that decides a feature.
    """

    student: Student
    geometry: Geometry
    layer: int
    identity: str

    def encode(self, keys: Sequence[str], contents: Iterable[bytes]) -> EncoderTokens:
        """Return the tokens of images from their files, as ``ProbedModel`` says; no key is read."""
        transform = self.student.image_transform(self.geometry)
        return self.tokens(torch.from_numpy(np.stack([transform(data) for data in contents])))

    @torch.inference_mode()
    def tokens(self, pixels_BCHW: Tensor) -> EncoderTokens:
        """Return the patch tokens (B, N, D) and [CLS] (B, D, if the tower has one), on the CPU."""
        tower: Any = self.student.vision_tower
        weight = next(tower.parameters())
        output = tower(pixels_BCHW.to(weight.device, weight.dtype), output_hidden_states=True)
        hidden_BTD = output.hidden_states[self.layer].float().cpu()
        has_cls = tower_type(tower.config).num_special == 1
        tokens_BND = hidden_BTD[:, num_prefix_tokens(tower.config) :]
        return EncoderTokens(tokens_BND, hidden_BTD[:, 0] if has_cls else None)


def load_encoder(
    model: str, device: str = "cpu", *, layer: int | None = None, image_size: int | None = None
) -> Encoder:
    """Return the encoder that ``model`` names.

    Args:
        model: a run, an export of format hf or encoder, a folder of a tower, or ``base:RUN``.
        device: where it runs.
        layer: hidden state to read. Default: the model's own; -2 for a folder of a tower.
        image_size: side in pixels for a folder of a tower. Default: its own.

    Raises:
        WeightsError: weights are missing or do not fit.
        ConfigError: it is none of these, the layer does not exist, or it has a size already.
    """
    model_dir = require_encoder(model, image_size)
    if (model_dir / CONFIG_FILE).exists():
        student, geometry = _of_run(model_dir, is_base=model.startswith(_BASE))
    else:
        student, geometry = _of_folder(model_dir, layer, image_size)
    vlm = student.vlm.eval().requires_grad_(False).to(device)
    chosen = int(vlm.config.vision_feature_layer if layer is None else layer)
    num_states = int(vlm.config.vision_config.num_hidden_layers) + 1
    if not -num_states <= chosen < num_states:
        raise ConfigError(
            f"--layer is {chosen}, but {model} has {num_states} hidden states; expected "
            f"-{num_states} to {num_states - 1}."
        )
    return Encoder(student, geometry, chosen, _identity(student, geometry, chosen))


def require_encoder(model: str, image_size: int | None = None) -> Path:
    """Return the folder that holds what ``model`` names, before anything is loaded.

    Raises:
        WeightsError: it holds no model.
        ConfigError: it is no run although ``base:`` says so, or it has a size already.
    """
    directory = Path(model.removeprefix(_BASE))
    model_dir = directory / "model" if (directory / "model").is_dir() else directory
    if image_size is not None and any((model_dir / f).exists() for f in (CONFIG_FILE, ABOUT_FILE)):
        raise ConfigError(
            f"--image-size is {image_size}, but {model} was trained at a size and is probed at "
            "that one. Leave it out; it is for folders of towers that movekd did not write."
        )
    if (model_dir / CONFIG_FILE).exists():
        return model_dir
    if model.startswith(_BASE):
        raise ConfigError(
            f"{model} names no run: {model_dir / CONFIG_FILE} does not exist. Expected base:RUN "
            "with the output of `movekd train`."
        )
    if (model_dir / "config.json").exists():
        return model_dir
    raise WeightsError(
        f"{model} holds neither {CONFIG_FILE} nor config.json; expected a run, an export of "
        "format hf or encoder, a Hugging Face folder of a vision tower, base:RUN, teacher:SPEC or "
        "cache:DIR#TEACHER."
    )


def _of_run(model_dir: Path, *, is_base: bool) -> tuple[Student, Geometry]:
    source = model_dir / CONFIG_FILE
    content = read_run_config(source)
    config = validate(StudentConfig, content.get("student", {}), str(source))
    geometry: Any = (content.get("data") or {}).get("geometry")
    if geometry not in get_args(Geometry):
        raise WeightsError(
            f"{source} lacks data.geometry; expected the config.yaml that `movekd train` wrote. "
            "Restore it."
        )
    keys: dict[str, Any] = {
        "vision_tower": local_base(config.vision_tower, model_dir),
        "attn_implementation": None,
    }
    if is_base:
        return build_encoder(config.model_copy(update=keys | {"mole": None})), geometry
    student = build_encoder(config.model_copy(update=keys))
    if any((model_dir / PART_FILES[part]).exists() for part in _PARTS):
        load_parts(model_dir, student.vlm, _PARTS)
    elif config.mole is not None or not any((model_dir / f).exists() for f in PART_FILES.values()):
        raise WeightsError(
            f"{model_dir} holds none of {', '.join(PART_FILES[part] for part in _PARTS)}, so its "
            "encoder is not trained; expected a run that ended. Give base: before it to probe the "
            "untrained tower."
        )
    return student, geometry


def _of_folder(
    directory: Path, layer: int | None, image_size: int | None
) -> tuple[Student, Geometry]:
    kind = str(read_json(directory / "config.json").get("model_type"))
    if not (directory / ABOUT_FILE).exists():
        keys: dict[str, Any] = {
            "vision_tower": str(directory),
            "image_size": image_size,
            "mole": None,
        }
        if layer is not None and layer < 0:
            keys["vision_feature_layer"] = layer
        return build_encoder(validate(StudentConfig, keys, str(directory))), "crop"
    if kind not in EXPORTED_TYPES.values() and kind not in EXPORTED_TYPES:
        trained = load_student(directory)
        return trained.student, trained.geometry
    about = read_encoder_about(directory / ABOUT_FILE)
    require_as_recorded(directory)
    if kind in EXPORTED_TYPES:  # an encoder without experts is a stock tower
        keys = {
            "vision_tower": str(directory),
            "mole": None,
            "vision_feature_layer": about.vision_feature_layer,
            "image_mean": about.image_mean,
            "image_std": about.image_std,
        }
        return build_encoder(validate(StudentConfig, keys, str(directory))), about.geometry
    with loading(str(directory), "the encoder in"):
        tower, info = exported_model(kind).from_pretrained(
            directory, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    require_whole(info, str(directory), "the encoder in")
    vlm = VisionEncoderOnly(tower, about.vision_feature_layer)
    return Student(vlm, None, about.image_mean, about.image_std), about.geometry


def _identity(student: Student, geometry: str, layer: int) -> str:
    tower, digest = student.vision_tower, hashlib.sha256()
    about = (layer, geometry, student.image_size, student.image_mean, student.image_std)
    digest.update(repr(about).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()
