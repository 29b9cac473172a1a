"""The ranks of a run: who prints, what torchrun says, and what ranks exchange.

The first half reads torchrun's environment. The second half talks to the other ranks and imports
torch inside its functions, so that the command line loads none. Every function is right for a
single process, too.
"""

import gc
import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from movekd.errors import MovekdError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process among those that one torchrun command started, on all nodes.

    Attributes:
        index: its rank; 0 is the main process.
        world_size: the number of ranks.
        local_index: its rank among those of this node.
        local_world_size: the number of ranks of this node.
        max_restarts: how often torchrun starts the ranks again after one failed.
    """

    index: int
    world_size: int
    local_index: int
    local_world_size: int
    max_restarts: int

    def __str__(self) -> str:
        return f"rank {self.index} on {socket.gethostname()}"


def torchrun_rank() -> Rank | None:
    """Return this process's rank; None without torchrun.

    Schedulers also set RANK and WORLD_SIZE, for jobs that know nothing of each other.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
    return Rank(*(int(os.environ[name]) for name in names))


def is_main_process() -> bool:
    """Return whether this process has rank 0; a single process has."""
    return int(os.environ.get("RANK", "0")) == 0


def num_restarts() -> int:
    """Return how often torchrun has restarted these processes after one failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str | None:
    """Return a name of this launch of torchrun on this machine; None without torchrun.

    It stays the same over restarts, also those for nodes that join or leave.
    """
    folder = _attempt_dir()
    return None if folder is None else f"{socket.gethostname()}:{folder.parent}"


def should_print(message: str) -> bool:
    """Return whether this process should print an error; that counts as printed.

    Under torchrun only one process per machine prints in an attempt, and no attempt repeats the
    message of an earlier one.
    """
    folder = _attempt_dir()
    if folder is None:
        return True
    digest = hashlib.sha256(message.encode()).hexdigest()[:16]
    try:
        (folder / "movekd-has-failed").touch(exist_ok=False)
        (folder.parent / f"movekd-said-{digest}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # printing twice is better than not at all
        return True
    return True


def _attempt_dir() -> Path | None:
    """Return torchrun's folder for this attempt of this machine's processes."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/1/error.json
    if not error_file:
        return None
    folder = Path(error_file).parent.parent
    return folder if folder.name.startswith("attempt_") and folder.is_dir() else None


def gather(value: T) -> list[T]:
    """Return the value of every rank, in order; every rank must call this."""
    from torch import distributed

    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast_decision(decide: Callable[[], T]) -> T:
    """Return in every rank what ``decide`` returns in rank 0; every rank must call this.

    For decisions that depend on files that rank 0 is about to write.

    Raises:
        MovekdError, OSError: in every rank, what ``decide`` raised.
    """
    from torch import distributed

    if not distributed.is_initialized():
        return decide()
    message: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            message = [decide()]
        except (MovekdError, OSError) as error:
            message = [error]
    distributed.broadcast_object_list(message, src=0)
    if isinstance(message[0], MovekdError | OSError):
        raise message[0]
    decision: T = message[0]
    return decision


def sum_over_ranks(tensor: "Tensor") -> "Tensor":
    """Return the sum of every rank's tensor, without gradient; every rank must call this."""
    from torch import distributed

    if not distributed.is_initialized():
        return tensor
    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total


def mean_over_ranks(tensor: "Tensor", weight: float) -> "Tensor":
    """Return the mean of every rank's tensor, weighted by ``weight``; zero if all weigh nothing."""
    from torch import distributed

    if not distributed.is_initialized():
        return tensor
    total = sum_over_ranks(tensor.new_tensor(weight))
    return sum_over_ranks(tensor * weight) / total.clamp(min=1)


def destroy_process_group() -> None:
    """Close the connection to the other ranks, when a run has ended well.

    Without this its threads may abort a process at the interpreter's exit after the run is
    complete, and torchrun reports the whole run as failed.
    """
    from torch import distributed

    if distributed.is_initialized():
        gc.collect()  # the model's wrapper holds the connection in reference cycles
        distributed.destroy_process_group()


def is_dead_peer_error(error: RuntimeError) -> bool:
    """Return whether an error says that another rank has ended."""
    from torch import distributed

    if not distributed.is_initialized():
        return False
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
