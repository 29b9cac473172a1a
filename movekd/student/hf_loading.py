"""Load models and tokenizers with transformers: run no code of theirs, report one error."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import dynamic_module_utils
from transformers.utils import logging as transformers_logging

from movekd.errors import MovekdError, WeightsError, shorten
from movekd.files.reading import pickle_refusal
from movekd.student.config import StudentConfig
from movekd.student.export import modeling_movekd
from movekd.student.model_files import check_model_files

SAFE_LOAD_KWARGS: dict[str, Any] = {"trust_remote_code": False, "weights_only": True}
"""How weights are loaded. The released CLIP and Vicuna are `.bin` files: pickles, from which only
tensors are read."""


def load_kwargs(config: StudentConfig) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for a base model of a student.

    Its dtype and attention are the config's; it returns what it found in the files, too.
    """
    kwargs = SAFE_LOAD_KWARGS | {
        "dtype": getattr(torch, config.dtype),
        "output_loading_info": True,
    }
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    return kwargs


def register_auto_classes() -> None:
    """Make transformers load exports with movekd's own classes, without ``trust_remote_code``.

    Afterwards ``AutoModel`` and ``LlavaForConditionalGeneration`` know the exported vision towers.
    """
    modeling_movekd.register_auto_classes()


def quiet_libraries() -> None:
    """Keep transformers' progress bars and advice out of a command's output."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def loading(source: str, key: str) -> Iterator[None]:
    """Turn every way in which loading fails into one error, and never ask on standard input.

    transformers asks whether to run the code of a directory, also for a part in the middle of a
    config.json, which no argument reaches; `ask --chat` reads its questions from standard input.

    Raises:
        WeightsError: the model cannot be loaded, or needs its own Python code.
    """
    check_model_files(source)
    register_auto_classes()
    patience = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except MovekdError:
        raise
    except BaseException as error:
        # transformers raises errors of all kinds about a damaged folder; tokenizers, which is Rust,
        # panics, and a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise WeightsError(
                f"{key} '{shorten(source)}' brings its own Python code (auto_map), which movekd "
                "never runs; expected a model and a tokenizer of kinds that transformers knows. "
                "Take the auto_map out of its JSON files if a stock class fits, or save it as one."
            ) from None
        raise WeightsError(
            f"{key} '{shorten(source)}' cannot be loaded: {_reason(error)} Expected a hub id or a "
            "directory with config.json and safetensors; without a network, download it elsewhere "
            "and give the directory."
        ) from None
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience


def require_whole(info: Mapping[str, Any], source: str, key: str, parts: str = "") -> None:
    """Refuse a model of which weights are missing; transformers fills them with random numbers.

    Args:
        info: what ``from_pretrained(output_loading_info=True)`` returns.
        source: the model, shown in the error.
        key: the name of ``source`` in an error.
        parts: start of the names that are needed. Default: all are.

    Raises:
        WeightsError: names what is missing or of another shape.
    """
    wrong = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind]]
    wrong = sorted(name for name in wrong if name.startswith(parts))
    if wrong:
        named = shorten(", ".join(wrong[:3]))
        raise WeightsError(
            f"{key} '{shorten(source)}' lacks {len(wrong)} of its weights ({named}); expected all "
            "of them, because the rest would be random numbers. Download it again."
        )


def _reason(error: BaseException) -> str:
    """Return the first line of an error, or its kind."""
    if (refusal := pickle_refusal(error)) is not None:
        return f"Weights only load failed of a .bin: {refusal}."
    lines = str(error).strip().splitlines()
    first = shorten(lines[0], 300) if lines else ""
    is_plain = isinstance(error, OSError | ValueError) and first
    return first if is_plain else f"{type(error).__name__} {first}".strip() + "."
