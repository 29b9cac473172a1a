"""How transformers is asked to load something: none of its code, no question, one sentence."""

import contextlib
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import dynamic_module_utils
from transformers.utils import logging as transformers_logging

from movekd.errors import WeightsError

SAFE_LOAD_KWARGS: dict[str, Any] = {"trust_remote_code": False, "weights_only": True}
"""How weights are loaded. The released CLIP and Vicuna are `.bin` files: pickles, of which tensors
are taken and nothing else."""


def quiet_libraries() -> None:
    """Keep progress bars and advice of transformers out of a command's own output."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def loading(source: str, key: str) -> Iterator[None]:
    """Turn the many ways in which loading fails into one sentence, and let nobody be asked.

    transformers asks on standard input whether to run the code of a directory, also for a part in
    the middle of a config.json, which no argument reaches; there `ask --chat` reads questions.
    """
    patience = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        if "trust_remote_code" in str(error):
            raise WeightsError(
                f"{key} '{source}' brings Python code of its own (auto_map), which movekd never "
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
