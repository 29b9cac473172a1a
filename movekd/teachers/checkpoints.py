"""Where a teacher's weights come from, and the refusal of anything but all of them.

Comes in: what a spec says under ``weights``. Goes out: a file, a state dict, a loaded module.
``teachers.providers`` uses it; nothing here knows an architecture.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from movekd.cache.spec import CacheSpec, load_spec, shipped_specs
from movekd.errors import WeightsError, did_you_mean

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars, warnings and load reports.

    What they would report (missing and unexpected keys) is checked here, and refused.
    """
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as hf_logging

    had_bars = hf_logging.is_progress_bar_enabled()
    levels = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    hf_logging.disable_progress_bar()  # the hub's as well
    hf_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if had_bars:
            hf_logging.enable_progress_bar()


def given_path(spec: CacheSpec) -> Path:
    """Return the directory or file that ``spec.weights`` names.

    Raises:
        WeightsError: it does not exist, or is a file of another kind.
    """
    path = Path(spec.weights)
    if not path.exists():
        raise WeightsError(
            f"weights of '{spec.name}': {path} does not exist; expected `hub`, a directory, or a "
            f".safetensors or .pth file. Correct `weights` in the teacher's YAML."
        )
    if path.is_file() and path.suffix not in SUFFIXES:
        raise WeightsError(
            f"weights of '{spec.name}': {path} is none of {', '.join(SUFFIXES)}. "
            "Give the directory or the file that holds the tensors."
        )
    return path


def weights_file(spec: CacheSpec, repo: str | None, names: Sequence[str]) -> Path:
    """Return the one file that holds the weights, downloaded where ``weights: hub`` asks for it.

    Args:
        spec: ``weights`` is ``hub``, a directory or a file.
        repo: the hub repository, None where nothing is published.
        names: file names in the repository, the preferred one first; looked for in a directory
            as well, before any other weights file.

    Raises:
        WeightsError: nothing is there, or it is not clear which file is meant.
    """
    if spec.weights == "hub":
        if repo is None:
            raise WeightsError(
                f"no weights are published for {spec.provider} model '{spec.model}'. "
                "Set `weights` in the teacher's YAML to a directory or a file."
            )
        return _download(spec, repo, names)
    path = given_path(spec)
    if path.is_file():
        return path
    candidates = (path / Path(name).name for name in (*names, "model.safetensors"))
    preferred = [file for file in candidates if file.is_file()]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if preferred or len(found) == 1:
        return (preferred or found)[0]
    listed = ", ".join(file.name for file in found[:5]) or "none"
    raise WeightsError(
        f"weights of '{spec.name}': {path} should hold {Path(names[0]).name} or a single weights "
        f"file; found {listed}. Set `weights` to the file itself."
    )


def _download(spec: CacheSpec, repo: str, names: Sequence[str]) -> Path:
    """Return the first of ``names`` that the repository holds, from the hub or its cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason: Exception | None = None
    for name in names:
        try:
            with quiet():
                return Path(hf_hub_download(repo, name, revision=spec.revision))
        except LocalEntryNotFoundError as error:  # no connection; another name may be cached
            reason = error
        except EntryNotFoundError as error:  # the repository has no such file
            reason = error
        except OSError as error:
            reason = error
            break
    raise unreachable(spec, repo, names, reason) from None


def unreachable(
    spec: CacheSpec, repo: str, names: Iterable[str], reason: object = None
) -> WeightsError:
    """Return the error that tells how to fetch weights by hand, and of a name nearly right."""
    why = f" ({str(reason).splitlines()[0]})" if reason and str(reason) else ""
    return WeightsError(
        f"weights of '{spec.name}' could not be fetched from {repo}{why}."
        f"{_nearest_shipped(spec)} Check the name and the connection, or "
        f"download {' or '.join(names)} from https://huggingface.co/{repo} on "
        "another machine and set `weights: DIRECTORY` in the teacher's YAML."
    )


def _nearest_shipped(spec: CacheSpec) -> str:
    """Suggest the model of a shipped spec: nobody can list all of the hub's."""
    known = {load_spec(name).model for name in shipped_specs()}
    return "" if spec.model in known else did_you_mean(spec.model, known, cutoff=0.8)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, on the CPU, in the dtype they are stored in.

    A training checkpoint's ``model`` or ``state_dict`` is taken. Nothing is executed:
    ``torch.load`` runs with ``weights_only=True``.

    Raises:
        WeightsError: the file is damaged, or holds more than tensors and plain containers.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(str(path)))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise WeightsError(
            f"{path} is not a readable weights file ({first_line(error)}). Download it again, or "
            "save the bare state dict as .safetensors."
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors; expected a state dict, or one under `model` or `state_dict`."
        )
    return tensors


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load ``state`` into ``module``: every key, and no other, in the shapes expected.

    Raises:
        WeightsError: keys are missing, unexpected or of another shape; names the first few.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise keys_differ(source, error) from None


def keys_differ(source: object, error: RuntimeError) -> WeightsError:
    """Return a short form of what PyTorch says when a state dict does not fit."""
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    said = " ".join(_shortened(line) for line in lines[:3]) or first_line(error)
    return WeightsError(
        f"{source} does not fit the architecture: {said} Check `model` and `model_args`, or take "
        "the weights that were published for this model."
    )


def _shortened(line: str, limit: int = 160) -> str:
    return line if len(line) <= limit else f"{line[:limit].rsplit(' ', 1)[0]} ..."


def first_line(error: Exception) -> str:
    """Return the first line of what a library said, or the name of its error."""
    return _shortened(str(error).splitlines()[0]) if str(error) else type(error).__name__
