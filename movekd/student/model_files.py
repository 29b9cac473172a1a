"""Check the small files of a model's folder before transformers reads them.

Input: a folder that a stranger may have written. Output: nothing, or an error that names the file.
transformers reads a folder without limits: it follows links, waits for a FIFO, and builds as many
layers as a config.json says. ``hf_loading.loading`` calls this module first. The files of a hub id
are left to the hub's library.
"""

import os
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from movekd.config import FrozenModel, Integer
from movekd.corpus.transforms import Geometry
from movekd.errors import ConfigError, WeightsError, shorten
from movekd.files.ownership import OWNERSHIP_FILE, FileEntry, file_entry, read_owned
from movekd.files.reading import MIB, read_json, read_text
from movekd.student.config import LanguageModelLoraKeys, PromptFormat

_LARGE = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")
_LARGE_BYTES, _SMALL_BYTES = 256 * MIB, 16 * MIB
_CONFIGS = (
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    "tokenizer_config.json",
)
_WEIGHTS = (".safetensors", ".bin")
_VOCABULARIES = (".txt", ".model")
_TEMPLATES = "additional_chat_templates"
_AGAIN = "Download the folder again, or copy the file into it."

_Small = Annotated[int, Field(ge=0, le=1024, strict=True)]
_Width = Annotated[int, Field(ge=0, le=2**20, strict=True)]
_Large = Annotated[int, Field(ge=-1, le=2**31, strict=True)]
_Side = Annotated[int, Field(ge=1, le=2**14, strict=True)]
_Token = Annotated[int, Field(ge=-1, lt=2**31, strict=True)]
_Tokens = _Token | list[_Token] | None
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
_Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Deviation = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class ModelSizes(BaseModel):
    """Keys of config files that decide how much is built, or that transformers does not check."""

    model_config = ConfigDict(extra="ignore")

    num_hidden_layers: _Small | None = None
    num_attention_heads: _Small | None = None
    num_key_value_heads: _Small | None = None
    num_register_tokens: _Small | None = None
    num_channels: _Small | None = None
    num_experts: _Small | None = None
    moe_encoder_num_experts: _Small | None = None
    hidden_size: _Width | None = None
    intermediate_size: _Width | None = None
    head_dim: _Width | None = None
    r: _Width | None = None
    expert_rank: _Width | None = None
    moe_encoder_lora_rank: _Width | None = None
    lora_alpha: _Positive | None = None
    expert_alpha: _Positive | None = None
    moe_encoder_lora_alpha: _Positive | None = None
    use_gate: bool | None = None
    model_max_length: _Positive | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] | None = None
    vocab_size: _Large | None = None
    max_position_embeddings: _Large | None = None
    image_size: _Side | list[_Side] | None = None
    patch_size: _Side | list[_Side] | None = None
    layers_to_transform: list[_Small] | None = None
    expert_blocks: list[_Small] | None = None
    bos_token_id: _Tokens = None
    eos_token_id: _Tokens = None
    pad_token_id: _Tokens = None
    decoder_start_token_id: _Tokens = None
    forced_bos_token_id: _Tokens = None
    forced_eos_token_id: _Tokens = None
    suppress_tokens: _Tokens = None
    begin_suppress_tokens: _Tokens = None
    image_token_id: _Tokens = None
    image_token_index: _Tokens = None
    max_length: _Large | None = None
    max_new_tokens: _Large | None = None
    min_length: _Large | None = None
    min_new_tokens: _Large | None = None
    no_repeat_ngram_size: _Large | None = None
    top_k: _Large | None = None
    num_beams: _Small | None = None
    num_return_sequences: _Small | None = None
    repetition_penalty: _Positive | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: _Unit | None = None


class _Teachers(FrozenModel):
    teachers: list[str] | None = None


class _Imported(BaseModel):
    model_config = ConfigDict(extra="ignore")

    source: str | None = Field(default=None, alias="from")
    vision_tower: str | None = None
    language_model: str | None = None


class MadeOf(BaseModel):
    """What an export says about its run, see ``provenance.made_of``."""

    model_config = ConfigDict(extra="ignore")

    recipe: str | None = None
    stage: str | None = None
    student: dict[str, str] | None = None
    distill: _Teachers | None = None
    imported: _Imported | None = None


class _ImageAbout(BaseModel):
    """What the ``movekd.json`` of every export says: how images become pixels."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    geometry: Geometry
    image_mean: tuple[_Unit, _Unit, _Unit]
    image_std: tuple[_Deviation, _Deviation, _Deviation]
    run: MadeOf | None = None


_AboutT = TypeVar("_AboutT", bound=_ImageAbout)


class EncoderAbout(_ImageAbout):
    """The ``movekd.json`` of an export of format encoder; its run may have had no prompt."""

    vision_feature_layer: Integer


class About(_ImageAbout):
    """The ``movekd.json`` of an export with a language model."""

    prompt: PromptFormat
    language_model_lora: LanguageModelLoraKeys | None = None
    """Of an adapter that lies beside the weights."""


def read_about(path: Path) -> tuple[About, dict[str, Any]]:
    """Return the ``movekd.json`` of an export, and what it says about its run, as JSON holds it.

    Raises:
        WeightsError: it is missing, damaged or of other values.
    """
    content = _read_object(path, _SMALL_BYTES)
    return _validate(About, content, path), content.get("run") or {}


def read_encoder_about(path: Path) -> EncoderAbout:
    """Return the ``movekd.json`` of an export of format encoder; raises as ``read_about``."""
    return _validate(EncoderAbout, _read_object(path, _SMALL_BYTES), path)


def _validate(model: type[_AboutT], content: dict[str, Any], path: Path) -> _AboutT:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise WeightsError(
            f"{path} has {_first(error)}; expected what `movekd export` wrote. Export the model "
            "again."
        ) from None


def require_as_recorded(directory: Path) -> None:
    """Refuse a model whose weights or config are not as movekd recorded them when it wrote them.

    The record lies in the folder (an export) or in the one above (a run, an imported model). A part
    that is gone would otherwise count as its untrained base. Reads the weights once more.

    Raises:
        WeightsError: names the files; or the record is damaged.
    """
    folder = directory.resolve()
    for owner, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        try:
            owned = read_owned(owner)
        except ConfigError:
            raise WeightsError(
                f"{owner / OWNERSHIP_FILE} is damaged, so nothing proves that the weights in "
                f"{directory} are those that movekd wrote. Restore it, or delete it to use them "
                "all the same."
            ) from None
        if owned is None:
            continue
        found = [
            f"{name} is {change}"
            for name, file in owned.files.items()
            if name.startswith(prefix) and name.endswith((*_WEIGHTS, f"{prefix}config.yaml"))
            if (change := _change(owner / name, file))
        ]
        if found:
            said = ", ".join(found[:5])
            raise WeightsError(
                f"{directory} is not as movekd wrote it: {shorten(said, 500)}. Restore it, or "
                f"write it again; if you changed it on purpose, delete {owner / OWNERSHIP_FILE}."
            )


def _change(path: Path, recorded: FileEntry) -> str:
    """Return how a file differs from its record, or an empty string.

    Follows links, of which a hub's cache consists; ``check_model_files`` says which may be there.
    """
    if not path.is_file():
        return "missing"
    if path.stat().st_size != recorded.size_bytes:
        return "of another size"
    return "" if file_entry(path).xxh3_128 == recorded.xxh3_128 else "of other content"


def check_model_files(source: str | Path) -> None:
    """Check what transformers would read of a folder; a hub id is left to the hub's library.

    Raises:
        WeightsError: a file is no regular file, is a link out of the folder, is too large or no
            JSON, or a config.json has a size that no model has.
    """
    if not os.path.isdir(source):  # Path.is_dir raises an error about a name that is too long
        return
    directory = Path(source)
    for folder in (directory, directory / _TEMPLATES):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix in (".json", ".jinja", *_VOCABULARIES, *_WEIGHTS):
                _check_file(path, directory)
    for name in _CONFIGS:
        if (directory / name).exists():
            _check_sizes(directory / name, _read_object(directory / name, _SMALL_BYTES))


def _check_file(path: Path, directory: Path) -> None:
    if not _is_inside(path, directory):
        raise WeightsError(
            f"{shorten(path)} is a link out of its folder; expected a file in it, because what a "
            f"link shows would be read and copied. {_AGAIN}"
        )
    try:
        found = path.stat()
    except OSError as error:
        raise WeightsError(
            f"{shorten(path)} cannot be read: {error.strerror}; expected a file. {_AGAIN}"
        ) from None
    if path.is_dir():
        return
    if not stat.S_ISREG(found.st_mode):
        raise WeightsError(f"{shorten(path)} is no regular file; expected one. {_AGAIN}")
    if path.suffix in _VOCABULARIES and found.st_size > _LARGE_BYTES:
        raise WeightsError(
            f"{shorten(path)} has {found.st_size:,} bytes; expected at most {_LARGE_BYTES:,} of a "
            f"vocabulary. {_AGAIN}"
        )
    max_bytes = _LARGE_BYTES if path.name in _LARGE else _SMALL_BYTES
    if path.suffix == ".json":
        read_json(path, max_bytes=max_bytes, error=WeightsError, remedy=_AGAIN, allow_nan=True)
    elif path.suffix == ".jinja":
        read_text(path, max_bytes=MIB, error=WeightsError, remedy=_AGAIN)


def _is_inside(path: Path, directory: Path) -> bool:
    """Return whether a file lies in its folder, or in the blobs of its model in a hub's cache."""
    if not any(part.is_symlink() for part in (path, path.parent) if part != directory):
        return True
    place, there = directory.resolve(), path.resolve()
    roots = [place]
    if place.parent.name == "snapshots":
        roots.append(place.parents[1] / "blobs")
    return any(there.is_relative_to(root) for root in roots)


def _check_sizes(path: Path, content: dict[str, Any]) -> None:
    """Check the sizes in a config and in the configs inside of it."""
    level: list[Any] = [content]
    while level:
        for part in level:
            try:
                ModelSizes.model_validate(part)
            except ValidationError as error:
                raise WeightsError(
                    f"{path} has {_first(error)}; expected the sizes of a model. {_AGAIN}"
                ) from None
        level = [value for part in level for value in part.values() if isinstance(value, dict)]


def _read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    content = read_json(
        path, max_bytes=max_bytes, error=WeightsError, remedy=_AGAIN, allow_nan=True
    )
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds {type(content).__name__}; expected a JSON object. {_AGAIN}"
        )
    return content


def _first(error: ValidationError) -> str:
    """Return the first problem of a validation: key, value and reason."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    return f"{shorten(key, 80)} {shorten(repr(first['input']), 80)} ({shorten(first['msg'])})"
