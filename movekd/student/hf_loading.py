"""Load models and tokenizers with transformers: run no code of theirs, report one error."""

import contextlib
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import dynamic_module_utils
from transformers.utils import logging as transformers_logging

from movekd.errors import WeightsError
from movekd.student.export import modeling_movekd

SAFE_LOAD_KWARGS: dict[str, Any] = {"trust_remote_code": False, "weights_only": True}
"""How weights are loaded. The released CLIP and Vicuna are `.bin` files: pickles, from which only
tensors are read."""


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
    register_auto_classes()
    patience = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        if "trust_remote_code" in str(error):
            raise WeightsError(
                f"{key} '{source}' brings its own Python code (auto_map), which movekd never "
                "runs; expected a model and a tokenizer of kinds that transformers knows. Take "
                "the auto_map out of its JSON files if a stock class fits, or save it as one."
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{key} '{source}' cannot be loaded: {reason[:300]} Expected a hub id or a directory "
            "with config.json and safetensors; without a network, download it elsewhere and give "
            "the directory."
        ) from None
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience
