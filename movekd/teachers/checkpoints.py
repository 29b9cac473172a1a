"""Find, read and load a teacher's weights; every key must be present and none left over.

Input: ``weights`` of a spec. Output: a file, a state dict, or a loaded module. The providers use
it. Nothing here knows an architecture.
"""

import logging
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from movekd.cache.spec import CacheSpec, load_spec, shipped_specs
from movekd.errors import WeightsError, did_you_mean, shorten
from movekd.files.reading import pickle_refusal


@dataclass(frozen=True)
class Published:
    """Where the weights of a model are published.

    Attributes:
        repo: the hub repository, None if they are published nowhere.
        files: file names that would do, the preferred one first.
    """

    repo: str | None = None
    files: Sequence[str] = ("model.safetensors",)


LIBRARY_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(MemoryError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, UnpicklingError),
)
"""What libraries raise about arguments and files that make no sense; they document few of them."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars, warnings and load reports.

    They report missing and unexpected keys, which the functions of this file refuse.
    """
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as hf_logging

    had_bars = hf_logging.is_progress_bar_enabled()
    levels = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    hf_logging.disable_progress_bar()  # this one covers the hub's bars too
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
        WeightsError: it does not exist, or is not a weights file.
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


def weights_file(spec: CacheSpec, place: Published) -> Path:
    """Return the file that holds the weights; ``weights: hub`` downloads it.

    Args:
        spec: ``weights`` is ``hub``, a directory or a file.
        place: where they are published. In a directory these file names are preferred.

    Raises:
        WeightsError: no such file, or several that could be meant.
    """
    if spec.weights == "hub":
        if place.repo is None:
            raise WeightsError(
                f"no weights are published for {spec.provider} model '{spec.model}'. "
                "Set `weights` in the teacher's YAML to a directory or a file."
            )
        return _download(spec, place.repo, place.files)
    path = given_path(spec)
    if path.is_file():
        return path
    candidates = (path / Path(name).name for name in (*place.files, "model.safetensors"))
    preferred = [file for file in candidates if file.is_file()]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if preferred or len(found) == 1:
        return (preferred or found)[0]
    listed = ", ".join(file.name for file in found[:5]) or "none"
    raise WeightsError(
        f"weights of '{spec.name}': {path} should hold {Path(place.files[0]).name} or a single "
        f"weights file; found {listed}. Set `weights` to the file itself."
    )


def _download(spec: CacheSpec, repo: str, names: Sequence[str]) -> Path:
    """Return the first of ``names`` in the repository, from the hub or its local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason: object = None
    is_local = not hub_answers()
    for name in names:
        try:
            with quiet():
                return Path(
                    hf_hub_download(repo, name, revision=spec.revision, local_files_only=is_local)
                )
        except LocalEntryNotFoundError as error:  # offline, but another name may be cached
            reason = error
        except EntryNotFoundError as error:  # try the next name
            reason = error
        except (OSError, ValueError) as error:  # ValueError: no name of a repository
            reason = error
            break
    raise unreachable(spec, repo, names, NO_ANSWER if is_local else reason) from None


NO_ANSWER = "the hub does not answer, and the files are not in its cache on this machine"


def hub_answers(timeout_s: float = 5.0) -> bool:
    """Return whether the hub answers anything at all.

    Without it, downloads are tried again for a minute or more before a library says so. Proxies and
    ``HF_ENDPOINT`` hold here as for downloads.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[object] = []

    def ask() -> None:
        with suppress(Exception):  # the client may raise the errors of several libraries
            answers.append(get_session().head(constants.ENDPOINT, timeout=timeout_s))

    # Looking the name up has no timeout, so a thread waits for it.
    thread = threading.Thread(target=ask, name="movekd-hub", daemon=True)
    thread.start()
    thread.join(timeout_s + 1)
    return bool(answers)


def unreachable(
    spec: CacheSpec, repo: str, names: Iterable[str], reason: object = None
) -> WeightsError:
    """Return an error that says how to fetch weights by hand and suggests the nearest model."""
    why = f" ({shorten(str(reason).splitlines()[0])})" if reason and str(reason) else ""
    return WeightsError(
        f"weights of '{spec.name}' could not be fetched from {shorten(repo)}{why}."
        f"{_nearest_shipped(spec)} Check the name and the connection, or "
        f"download {' or '.join(names)} from https://huggingface.co/{shorten(repo)} on "
        "another machine and set `weights: DIRECTORY` in the teacher's YAML."
    )


def _nearest_shipped(spec: CacheSpec) -> str:
    """Suggest the model of a shipped spec; the hub has too many models to list."""
    known = {load_spec(name).model for name in shipped_specs()}
    return "" if spec.model in known else did_you_mean(spec.model, known, cutoff=0.8)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, on the CPU, in their stored dtype.

    Of a training checkpoint, ``model`` or ``state_dict`` is read. ``weights_only=True`` keeps
    pickled files from running code.

    Raises:
        WeightsError: the file is damaged, or holds more than tensors and plain containers.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(str(path)))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise WeightsError(
            f"{path} is not a readable weights file "
            f"({pickle_refusal(error) or first_line(error)}). Download it again, or "
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


def tensors_below(prefix: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the part of a state dict below ``prefix``, without it; all if it is only that part."""
    below = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return below or state


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load ``state`` into ``module``, whose keys and shapes must match exactly.

    Raises:
        WeightsError: keys are missing, unexpected or of another shape; names the first ones.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise keys_differ(source, error) from None


def keys_differ(source: object, error: RuntimeError) -> WeightsError:
    """Return a short form of PyTorch's error about a state dict that does not fit."""
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    said = " ".join(_shortened(line) for line in lines[:3]) or first_line(error)
    return WeightsError(
        f"{source} does not fit the architecture: {said} Check `model` and `model_args`, or take "
        "the weights that were published for this model."
    )


def _shortened(line: str, limit: int = 160) -> str:
    return line if len(line) <= limit else f"{line[:limit].rsplit(' ', 1)[0]} ..."


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, or its class name if it has no message."""
    return _shortened(str(error).splitlines()[0]) if str(error) else type(error).__name__
