"""Read and write tensors by name: safetensors and PyTorch's ``.bin``.

Input: a directory or a file of a checkpoint. Output: each tensor when it is asked for, so that a
checkpoint is never in memory twice. A ``.bin`` is a pickle, and a pickle can hold a program:
``weights_only`` builds tensors and refuses everything else. Used by ``official`` and ``export``.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from movekd.errors import WeightsError, did_you_mean, shorten
from movekd.files import reading

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
SHARD_BYTES = 5_000_000_000
"""Maximum bytes of weights per file, as on the hub."""

_MAX_BYTES = 256 * reading.MIB

Shapes = Mapping[str, tuple[int, ...]]


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some weight files; each is read when it is asked for.

    Args:
        files: file -> names that are taken from it; None takes all that it holds.

    Raises:
        WeightsError: a file is missing, damaged, holds something other than tensors, or lacks a
            name.
    """

    def __init__(self, files: Mapping[Path, Iterable[str] | None]) -> None:
        self._sources: dict[str, Any] = {}
        for path, names in files.items():
            source = _open_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
            held = set(source.keys())
            taken = held if names is None else set(names)
            if taken - held:
                raise WeightsError(
                    f"{path} lacks {len(taken - held)} tensors that its index promises "
                    f"({', '.join(sorted(taken - held)[:3])}); download it again."
                )
            self._sources |= dict.fromkeys(sorted(taken), source)

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        tensor: Tensor = source[name] if isinstance(source, dict) else source.get_tensor(name)
        return tensor

    def __iter__(self) -> Any:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the file's header where it has one."""
        source = self._sources[name]
        if isinstance(source, dict):
            return tuple(source[name].shape)
        return tuple(source.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, from the file's header where it has one."""
        source = self._sources[name]
        has_header = not isinstance(source, dict) and bool(self.shape(name))
        tensor: Tensor = source.get_slice(name)[:0] if has_header else self[name]
        return tensor.dtype


def open_checkpoint(directory: Path) -> TensorFiles:
    """Return the tensors of a checkpoint directory: one file, or shards with an index.

    Raises:
        WeightsError: the directory holds none, or a file is missing or damaged.
    """
    for name in INDEX_FILES:
        if (directory / name).exists():
            return TensorFiles(_shards(directory / name))
    for name in SINGLE_FILES:
        if (directory / name).exists():
            return TensorFiles({directory / name: None})
    raise WeightsError(
        f"{directory} holds no weights; expected one of {', '.join(INDEX_FILES + SINGLE_FILES)}. "
        "Download the whole checkpoint."
    )


def read_bin(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.bin``; nothing in the file is executed.

    Raises:
        WeightsError: missing, damaged, or it holds something other than tensors by name.
    """
    content: Any = None
    for mmap in (True, False):  # files of PyTorch before 1.6 cannot be mapped
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch advises to run a TorchScript archive
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            break
        except FileNotFoundError:
            raise WeightsError(f"{path} does not exist; expected a file of weights.") from None
        except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, ...
            if not mmap:
                raise WeightsError(_unreadable(path, error)) from None
    is_plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not is_plain:
        raise WeightsError(
            f"{path} holds {type(content).__name__}; expected tensors by name, as "
            "torch.save(model.state_dict()) writes them."
        )
    tensors: dict[str, Tensor] = content
    return tensors


def write_bin(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as a ``.bin`` that ``torch.load(weights_only=True)`` reads."""
    # a view would drag its whole storage into the file
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    torch.save(plain, path)


def write_shards(
    directory: Path,
    shapes: Mapping[str, Tensor],
    read: Callable[[str], Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model.safetensors``, or shards with an index where it would grow too large.

    Args:
        directory: where to.
        shapes: tensors by name; on the meta device where ``read`` gives the values.
        read: returns the values of a name when it is its turn.
        shard_bytes: maximum bytes per file; a larger tensor gets a file by itself.
    """
    directory.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file(  # the dict has no name, so that it is freed before the next file is read
            {
                name: (shapes[name] if read is None else read(name)).detach().cpu().contiguous()
                for name in names
            },
            directory / file,
            metadata={"format": "pt"},
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (directory / INDEX_FILES[0]).write_text(text, encoding="utf-8")


def describe_difference(found: Shapes, expected: Shapes) -> str:
    """Return how names and shapes differ, for an error; empty if they are the same."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
    said = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if shapes:
        first = shapes[0]
        said.append(
            f"{len(shapes)} of another shape ({first} is {list(found[first])}, expected "
            f"{list(expected[first])})"
        )
    near = did_you_mean(unexpected[0], missing, cutoff=0.9) if unexpected else ""
    return "; ".join(said) + (near and f" ({near.strip()})")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        WeightsError: missing, or no JSON object.
    """
    content = reading.read_json(
        path, max_bytes=_MAX_BYTES, error=WeightsError, remedy="Download it again.", allow_nan=True
    )
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}; expected a JSON object.")
    return content


def _shards(index: Path) -> dict[Path, list[str]]:
    """Return the names in each file of an index; the files must lie beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map; download it again.")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise WeightsError(
                f"{index} sends '{shorten(name)}' to {shorten(repr(file))}; expected the name of a "
                "file beside it."
            )
        files.setdefault(index.parent / file, []).append(name)
    return files


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; expected a file of weights.") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}. Download it again.") from None


def _unreadable(path: Path, error: Exception) -> str:
    if (refusal := reading.pickle_refusal(error)) is not None:
        return (
            f"{path} was not loaded: {refusal}; expected plain tensors by name. Download it again, "
            "or ask for safetensors."
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path} cannot be read: {shorten(first)} Download it again."
