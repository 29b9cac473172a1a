"""The processes of a run, where there are several: they agree, and a lost one is a sentence.

Used by ``run``. Everything here is right for one process, too.
"""

import gc
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from movekd.errors import MovekdError

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Return what every process gives, in their order; every process must come here."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def decide(choose: Callable[[], T]) -> T:
    """Return in every process what the first one chooses; every process must come here.

    For what is read from files that the first process is about to write.

    Raises:
        MovekdError, OSError: what ``choose`` raised, in every process.
    """
    if not distributed.is_initialized():
        return choose()
    told: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            told = [choose()]
        except (MovekdError, OSError) as error:
            told = [error]
    distributed.broadcast_object_list(told, src=0)
    if isinstance(told[0], MovekdError | OSError):
        raise told[0]
    chosen: T = told[0]
    return chosen


def leave() -> None:
    """Give the connection to the other processes back, when a run has ended well.

    Left to the end of the interpreter, its threads were seen to abort a process whose run was
    complete; torchrun then reports the whole run as failed.
    """
    if distributed.is_initialized():
        gc.collect()  # what still holds the connection: the model's wrapper, in circles
        distributed.destroy_process_group()


def is_of_a_lost_process(error: RuntimeError) -> bool:
    """Return whether an error says that another process has gone."""
    if not distributed.is_initialized():
        return False
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
