"""CacheSpec: the settings of one teacher, from a YAML file of cache_specs/.

Input: YAML. Output: ``CacheSpec``, for ``teachers.teacher`` (model and layer),
``corpus.transforms`` (pixels) and ``cache.codecs`` (how tokens are stored). The attributes of the
teacher's Zarr group hold all of it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from movekd.cache.codecs import codec_names
from movekd.cache.codecs.lowrank import LOWRANK, lowrank_codec
from movekd.cache.model_args import check_model_args
from movekd.config import FrozenModel, read_yaml, validate
from movekd.corpus.transforms import Geometry, Resample
from movekd.errors import ConfigError, did_you_mean, shorten
from movekd.resources import resource_dir

WEIGHTS_WORDS = ("hub", "random", "factory")
"""Values of ``weights`` that are not a path."""


LIMITS = ("max_error", "max_energy_error")
"""Keys that stop a build and change no byte."""
DEFAULT_STD_FLOOR = 0.25
"""``std_floor`` of a new teacher in a cache whose spec does not say."""
DEFAULT_CLS_ATTENTION_HEADS = "mean"
"""The same for ``cls_attention_heads``."""
MAX_IMAGE_SIZE = 8_192
MAX_GRID = 1_024


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected text without control characters")
    return text


def _in_0_to_1(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(0 <= value <= 1 for value in values):  # NaN as well
        raise ValueError("every value must be from 0 to 1; divide values of 0..255 by 255")
    return values


def _inside(revision: str) -> str:
    if revision.startswith("/") or ".." in revision:
        raise ValueError("expected the name of a branch, a tag or a commit")
    return revision


Name = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
Place = Annotated[str, Field(max_length=4_096), AfterValidator(_printable)]
Colour = Annotated[tuple[float, float, float], AfterValidator(_in_0_to_1)]


class RecodedFrom(FrozenModel):
    """What held a teacher's tokens before `movekd cache recode` encoded them again."""

    codec: Name
    calibration: str = Field(pattern="^[0-9a-f]{32}$")
    """``Calibration.hash`` of that cache."""


class CacheSpec(FrozenModel):
    """One teacher: its model, its input, which features are taken, and how they are stored."""

    name: str = Field(
        max_length=100,
        pattern=r"^[a-z0-9][a-z0-9_]*$",
        description="Name of the teacher's group in the cache.",
    )
    description: str = Field(
        default="", max_length=10_000, description="One line for readers of the file."
    )

    provider: str = Field(
        max_length=100,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="The library that defines the architecture, for example transformers or timm; "
        "python for a module of your own.",
    )
    model: Name = Field(
        description="The model's name in that library, or a hub id. Default with provider python: "
        "the factory."
    )
    factory: str | None = Field(
        default=None,
        max_length=1_000,
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="provider python: package.module:function, called with `model_args`; returns "
        "the network.",
    )
    revision: Annotated[Name, AfterValidator(_inside)] = Field(
        default="main", description="Revision of the weights on the hub."
    )
    weights: Place = Field(
        default="hub",
        description="hub, a local directory, a .safetensors or .pth file, `random` (for tests "
        "and benchmarks), or `factory` (provider python: the function loads the weights).",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of `weights: random`.")
    model_args: Annotated[dict[str, Any], AfterValidator(check_model_args)] = Field(
        default_factory=dict,
        description="Arguments of the architecture; a published model needs none.",
    )

    image_size: int = Field(
        gt=0, le=MAX_IMAGE_SIZE, description="Side of the square input in pixels."
    )
    geometry: Geometry | None = Field(
        default=None, description="Resize mode of this teacher; null: that of the cache."
    )
    resample: Resample = Field(default="bicubic", description="Pillow filter of the resize.")
    mean: Colour = Field(description="Channel means of pixels in 0..1.")
    std: Colour = Field(description="Channel standard deviations of pixels in 0..1.")
    fill: Colour | None = Field(
        default=None, description="Colour of padding in 0..1; null: the mean."
    )

    layer: Annotated[int, Field(ge=-1_000, le=1_000)] | Literal["last", "neck"] = Field(
        description="Index into the hidden states (-2: before the last block), `last` (the model's "
        "own output), or `neck` (SAM)."
    )
    cls: bool = Field(default=False, description="Store the [CLS] embedding of that layer.")
    cls_attention: bool = Field(
        default=False,
        description="Store the attention row of [CLS] in the block before that layer; for `last`, "
        "in the last block.",
    )
    cls_attention_heads: Literal["mean", "all"] | None = Field(
        default=None,
        description="Stored heads of that attention: their mean, which the losses use, or all. "
        f"null: {DEFAULT_CLS_ATTENTION_HEADS} for a teacher that is new in a cache, otherwise what "
        "the cache has.",
    )
    cls_source: Literal["token", "attention_pool"] = Field(
        default="token",
        description="Source of [CLS]: its token, or for a model without one (SigLIP) the "
        "attention-pooling head: its output, and its probe's attention over the patches.",
    )

    grid: Literal["native"] | Annotated[int, Field(gt=0, le=MAX_GRID)] = Field(
        default="native", description="Side of the stored grid; `native`: the grid of the teacher."
    )
    codec: str = Field(
        default="int8",
        description="How tokens are stored: the name of a codec, for example float16, int8 or "
        "lowrank32. lowrank: the calibration chooses the rank, the smallest one that keeps "
        "max_energy_error.",
    )
    compressor: Literal["none", "zstd", "blosc"] = Field(
        default="none",
        description="Compression of each row, for archives; reading is fastest with `none`.",
    )
    max_error: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="The build stops if the relative error of a token, in standardised "
        "channels, exceeds this; null: never.",
    )
    max_energy_error: float | None = Field(
        default=None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="The build stops if the energy error of a Zarr shard (squared error over "
        "squared norm of its tokens, in standardised channels) exceeds this; a last one of fewer "
        "than 32 images only gives a warning; null: never.",
    )
    calibration_images: int = Field(
        default=512,
        gt=0,
        le=10**9,
        description="Number of images that the channel statistics are computed from.",
    )
    std_floor: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Smallest standard deviation of a channel, as a share of the median over the "
        "channels, so that channels that rarely fire do not dominate the loss; 0: no floor. null: "
        f"{DEFAULT_STD_FLOOR} for a teacher that is new in a cache, otherwise what the cache has.",
    )
    recoded_from: tuple[RecodedFrom, ...] = Field(
        default=(),
        max_length=100,
        description="Codecs that held the tokens before, and the hashes of their calibrations. "
        "Only `movekd cache recode` sets it.",
    )

    @field_validator("codec")
    @classmethod
    def _codec_is_known(cls, codec: str) -> str:
        known = codec_names()
        try:
            is_known = codec in known or lowrank_codec(codec) is not None
        except ConfigError as error:  # pydantic collects errors of values
            raise ValueError(error) from None
        if not is_known:
            raise ValueError(f"expected one of {', '.join(known)}.{did_you_mean(codec, known)}")
        return codec

    @field_validator("std")
    @classmethod
    def _std_is_positive(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError("every value must be above 0")
        return std

    @model_validator(mode="before")
    @classmethod
    def _factory_names_the_model(cls, content: Any) -> Any:
        is_python = isinstance(content, dict) and content.get("provider") == "python"
        if is_python and "model" not in content and "factory" in content:
            return {**content, "model": content["factory"]}
        return content

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "CacheSpec":
        if self.cls_attention and self.layer == "neck" and self.cls_source == "token":
            raise ValueError(
                "cls_attention is read in the block before the layer, and a neck is behind no "
                "single one; set layer to an index or last"
            )
        if self.codec == LOWRANK and self.max_energy_error is None:
            raise ValueError(
                f"codec {LOWRANK} needs max_energy_error, for which the calibration chooses the "
                f"rank; set it, for example to 0.05, or name a rank: {LOWRANK}32"
            )
        if self.provider == "python":
            if self.factory is None:
                raise ValueError("provider python needs factory: package.module:function")
            if self.cls_source != "token":
                raise ValueError(
                    "cls_source is for the libraries' models; with provider python, forward "
                    "returns a movekd.teachers.TeacherOutput with cls_BD and cls_attention_BHN"
                )
        elif self.factory is not None:
            raise ValueError(
                f"factory goes with provider python, not {self.provider}; drop it, or set "
                "provider: python"
            )
        elif self.weights == "factory":
            raise ValueError(
                f"weights: factory goes with provider python, not {self.provider}; give hub, a "
                "directory or a file"
            )
        return self

    def with_changes(self, **changes: Any) -> "CacheSpec":
        """Return the spec with some keys changed, checked again.

        Raises:
            ConfigError: a changed value cannot be.
        """
        return validate(CacheSpec, self.model_dump() | changes, f"teacher '{self.name}'")

    def differences(self, other: "CacheSpec", where: str) -> list[str]:
        """Return the keys that decide bytes and differ; ``where`` says where ``other`` stands."""
        own, others = self._settled(), other._settled()
        return [
            f"{key} is {own[key]!r} in the cache, {others[key]!r} {where}"
            for key in own
            if own[key] != others[key] and key not in ("description", "weights", *LIMITS)
        ]

    def as_stored(self) -> dict[str, Any]:
        """Return the spec as the attributes of the teacher's group hold it.

        It says whether weights were given, not where they lie. Keys that came later are left out
        where they say what caches without them have: no ``std_floor``, no limit of the energy
        error, all heads of the attention, tokens of the teacher itself.
        """
        content = self.model_dump(mode="json")
        content["weights"] = "random" if self.weights == "random" else "given"
        if not self.std_floor:
            del content["std_floor"]
        if self.max_energy_error is None:
            del content["max_energy_error"]
        if self.stored_heads == "all":
            del content["cls_attention_heads"]
        if not self.recoded_from:
            del content["recoded_from"]
        return content

    def _settled(self) -> dict[str, Any]:
        keys = {"std_floor": self.std_floor or 0.0, "cls_attention_heads": self.stored_heads}
        return self.model_dump() | keys

    @property
    def stored_heads(self) -> Literal["mean", "all"]:
        """``cls_attention_heads`` of a stored spec: without the key, all heads."""
        return "mean" if self.cls_attention and self.cls_attention_heads == "mean" else "all"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every key that changes the stored bytes.

        It leaves out the description, the limits of errors, and the place of the weights, whose
        SHA-256 is recorded beside it.
        """
        left_out = ("description", *LIMITS)
        content = {key: v for key, v in self.as_stored().items() if key not in left_out}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shipped_specs() -> dict[str, Path]:
    """Return the teachers in cache_specs/, name -> YAML file, sorted by name."""
    return {path.stem: path for path in sorted(resource_dir("cache_specs").glob("*.yaml"))}


def load_spec(teacher: str) -> CacheSpec:
    """Return the spec of a shipped teacher or of a YAML file.

    A relative path in ``weights`` starts at the folder of the YAML file.

    Raises:
        ConfigError: no such teacher (names the nearest), or a wrong key.
    """
    shipped = shipped_specs()
    is_file = teacher.endswith((".yaml", ".yml"))
    if not is_file and teacher not in shipped:
        raise ConfigError(
            f"no teacher '{shorten(teacher)}' in cache_specs/.{did_you_mean(teacher, shipped)} "
            f"Known: {', '.join(shipped)}; or give the path of a YAML file."
        )
    path = Path(teacher) if is_file else shipped[teacher]
    content = read_yaml(path)
    if content.get("recoded_from"):
        raise ConfigError(
            f"{path}: recoded_from is a record of `movekd cache recode`, and features of a teacher "
            "are recoded from none. Leave the key out."
        )
    weights = content.get("weights")
    if isinstance(weights, str) and weights not in WEIGHTS_WORDS:
        content["weights"] = os.path.abspath(path.parent / weights)
    return validate(CacheSpec, content, str(path))
