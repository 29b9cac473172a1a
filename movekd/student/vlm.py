"""Build the student: a LLaVA-1.5 or LLaVA-NeXT whose vision tower has LoRA experts.

Input: a StudentConfig (hub ids or directories). Output: a ``Student``: the model, its tokenizer and
the mean and deviation of its pixels. ``build_encoder`` gives only the tower, under the names that
it has inside a LLaVA. Used by training, evaluation and ``ask``; knows nothing of teachers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    LlavaNextForConditionalGeneration,
)
from transformers.utils import cached_file

from movekd.corpus.anyres import Views
from movekd.corpus.transforms import Geometry, ImageTransform
from movekd.errors import ConfigError
from movekd.student.config import StudentConfig
from movekd.student.hf_loading import loading
from movekd.student.hidden_state import image_hidden_state, patch_tokens, tower_hidden_state
from movekd.student.language_loading import check_language_model, load_language_model
from movekd.student.language_lora import add_adapter
from movekd.student.llava import new_llava
from movekd.student.mole import MoleConfig
from movekd.student.output_layer import untied_output
from movekd.student.projector import count_image_tokens, patch_grid, projector_type, prompt_grid
from movekd.student.tensor_files import read_json
from movekd.student.tokenizer import IMAGE_TOKEN
from movekd.student.tower_loading import load_tower, read_tower_config, require_tile_size
from movekd.student.towers import num_prefix_tokens, tower_type


@dataclass(frozen=True)
class Student:
    """A vision-language model, its tokenizer and the statistics of its pixels.

    A student of stage distill has a ``VisionEncoderOnly`` as its ``vlm`` and no tokenizer.
    """

    vlm: Any
    tokenizer: Any
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @property
    def vision_tower(self) -> nn.Module:
        """The student encoder, with its experts."""
        tower: nn.Module = self.vlm.model.vision_tower
        return tower

    @property
    def image_size(self) -> int:
        """Side length of the input in pixels."""
        return int(self.vlm.config.vision_config.image_size)

    @property
    def grid(self) -> int:
        """Side length of the grid of patch tokens, which the KD loss compares."""
        return patch_grid(self.vlm.config.vision_config)

    @property
    def num_patches(self) -> int:
        """Patch tokens per view."""
        return self.grid**2

    @property
    def prompt_grid(self) -> int:
        """Side length of the grid of tokens that the projector makes of a view."""
        return prompt_grid(projector_type(self.vlm), self.vlm.config.vision_config)

    @property
    def num_image_tokens(self) -> int:
        """Tokens per view in the prompt."""
        return self.prompt_grid**2

    @property
    def views(self) -> Views:
        """The views of an image that the model looks at."""
        return "anyres" if isinstance(self.vlm, LlavaNextForConditionalGeneration) else "base"

    @property
    def has_tiles(self) -> bool:
        """Whether an image is more than one view."""
        return self.views != "base"

    def count_tokens(self, widths: ArrayLike, heights: ArrayLike) -> NDArray[np.int64]:
        """Return how many tokens each image has in the prompt, by its size in pixels."""
        return count_image_tokens(self.views, self.prompt_grid, widths, heights)

    @property
    def width(self) -> int:
        """Channels of a patch token."""
        return int(self.vlm.config.vision_config.hidden_size)

    def image_transform(self, geometry: Geometry) -> ImageTransform:
        """Return the transform from image bytes to the tower's input."""
        return ImageTransform(
            image_size=self.image_size,
            geometry=geometry,
            resample="bicubic",
            mean=self.image_mean,
            std=self.image_std,
            fill=None,
        )


def image_token_counter(
    config: StudentConfig,
) -> Callable[[ArrayLike, ArrayLike], NDArray[np.int64]]:
    """Return a function that counts the tokens of images; loads only the tower's config.

    Raises:
        WeightsError: the tower's config cannot be found.
        ConfigError: the tower is of an unknown type, or the projector does not fit it.
    """
    views: Views = "anyres" if config.architecture == "llava_next" else "base"
    grid = prompt_grid(config.projector_type, read_tower_config(config))
    return lambda widths, heights: count_image_tokens(views, grid, widths, heights)


def build_vlm(config: StudentConfig) -> Student:
    """Load tower, language model and tokenizer, and put a new projector and experts between.

    The projector and the experts take their random numbers from torch's current seed.

    Raises:
        WeightsError: a tower or a language model cannot be found.
        ConfigError: experts or projector do not fit the tower, its type is unknown, or the config
            names no language model.
    """
    check_language_model(config)
    tower_config = read_tower_config(config)  # refuses what does not fit before weights are read
    require_tile_size(config, tower_config.image_size)
    prompt_grid(config.projector_type, tower_config)
    tower = load_tower(config)
    language_model, tokenizer = load_language_model(config)
    lm_head = untied_output(language_model)  # before the config is made, which copies what it says
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    vlm = new_llava(config, tower.config, language_model.config, image_token)
    vlm.model.vision_tower = tower
    vlm.model.language_model = language_model.model
    vlm.lm_head = lm_head
    vlm.generation_config = language_model.generation_config
    _add_experts(tower, config)
    if config.language_model_lora is not None:
        add_adapter(vlm, config.language_model_lora)
    mean, std = _mean_and_std(config)
    for parameter in vlm.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # 4-bit weights are integers
    return Student(vlm, tokenizer, mean, std)


def build_encoder(config: StudentConfig) -> Student:
    """Load the tower and put new experts into it; no language model, no projector.

    Raises:
        WeightsError: the tower cannot be found.
        ConfigError: experts do not fit into the tower, or its type is unknown.
    """
    tower = load_tower(config)
    _add_experts(tower, config)
    mean, std = _mean_and_std(config)
    encoder = VisionEncoderOnly(tower, config.vision_feature_layer)
    encoder.requires_grad_(True)
    return Student(encoder, None, mean, std)


class VisionEncoderOnly(nn.Module):
    """A vision tower under the names that it has inside a LLaVA.

    Files of parts and checkpoints fit both.

    Args:
        tower: the vision tower.
        layer: index of the hidden state that is read.
    """

    def __init__(self, tower: nn.Module, layer: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"vision_tower": tower})
        self.config = SimpleNamespace(vision_config=tower.config, vision_feature_layer=layer)
        self._num_prefix = num_prefix_tokens(tower.config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def hidden_state(self, pixels_BCHW: Tensor) -> Tensor:
        """Return all tokens (B, T, D) of the layer that is read."""
        return tower_hidden_state(self, pixels_BCHW)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the patch tokens (B, N, D) of the layer that is read."""
        return self.hidden_state(pixels_BCHW)[:, self._num_prefix :]


def mole_config(config: StudentConfig, num_layers: int, mlp: str = "mlp") -> MoleConfig:
    """Return the PEFT config of a tower's experts.

    Args:
        config: the student.
        num_layers: blocks of the tower.
        mlp: name of the MLP in a block.

    Raises:
        ConfigError: ``layers_to_transform`` names a block that the tower does not have, or experts
            per teacher lack the teachers' names.
    """
    keys = config.mole
    assert keys is not None
    blocks = keys.layers_to_transform
    if blocks == "all":
        blocks = list(range(num_layers))
    elif not isinstance(blocks, list):  # the hidden state before block i has index i
        blocks = list(range(num_layers + 1 + config.vision_feature_layer))
    elif outside := [block for block in blocks if not 0 <= block < num_layers]:
        raise ConfigError(
            f"student.mole.layers_to_transform names block {outside[0]}; the vision tower has "
            f"{num_layers} blocks, 0 to {num_layers - 1}. Name some of these, or use all or read."
        )
    if keys.experts == "per_teacher" and keys.teachers is None:
        raise ConfigError(
            "student.mole.experts is per_teacher, and student.mole.teachers is null; expected the "
            "names of the teachers that have experts. Name them."
        )
    return MoleConfig(
        teachers=keys.teachers,
        num_experts=keys.num_experts,
        r=keys.r,
        lora_alpha=keys.lora_alpha,
        lora_dropout=keys.lora_dropout,
        use_gate=bool(keys.use_gate),
        init_lora_weights=keys.init_lora_weights or "zero",
        target_modules=[mlp],
        layers_to_transform=blocks,
    )


def image_features(
    vlm: Any, pixels_BCHW: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None
) -> tuple[Any, Tensor]:
    """Return transformers' image output and the student's patch tokens (B, N, D).

    For LLaVA-NeXT, B counts the views of all images, in order, and ``image_sizes`` holds height and
    width of each image in pixels.

    Pass the output to the model as ``mm_encoder_outputs={"image": output}``, so that the tower runs
    only once. It is None for a ``VisionEncoderOnly``.
    """
    output, hidden_BTD = image_hidden_state(vlm, pixels_BCHW, image_sizes)
    return output, patch_tokens(hidden_BTD, vlm.config.vision_config)


def _add_experts(tower: Any, config: StudentConfig) -> None:
    if config.mole is not None:
        mlp = tower_type(tower.config).mlp
        inject_adapter_in_model(mole_config(config, tower.config.num_hidden_layers, mlp), tower)


def _mean_and_std(
    config: StudentConfig,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if config.image_mean is not None and config.image_std is not None:
        return config.image_mean, config.image_std
    with loading(config.vision_tower, "student.vision_tower"):
        path = cached_file(config.vision_tower, "preprocessor_config.json")
    keys = read_json(Path(path))
    try:
        mean, std = (tuple(map(float, keys[key])) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path} holds no image_mean and image_std; give student.image_mean and image_std."
        ) from None
    return mean, std  # type: ignore[return-value]  # three channels, as every RGB tower has
