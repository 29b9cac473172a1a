"""What a process knows of the ones beside it before torch is loaded: torchrun's environment.

Used by the command line, so that one process speaks for all, and by ``train``, which goes on with a
run that torchrun started again.
"""

import hashlib
import os
import socket
from pathlib import Path


def is_first() -> bool:
    """Return whether this is the process that speaks for all; alone, it is."""
    return int(os.environ.get("RANK", "0")) == 0


def num_restarts() -> int:
    """Return how often torchrun has started these processes again after one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str | None:
    """Return what tells this start of torchrun on this machine from any other, or None.

    The same after each of its restarts, those for nodes that come and go included.
    """
    folder = _attempt_folder()
    return None if folder is None else f"{socket.gethostname()}:{folder.parent}"


def should_print(sentence: str) -> bool:
    """Return whether nobody beside this process has said so; then it counts as said.

    Under torchrun one process of a machine speaks in an attempt, and none repeats an earlier one.
    """
    folder = _attempt_folder()
    if folder is None:
        return True
    digest = hashlib.sha256(sentence.encode()).hexdigest()[:16]
    try:
        (folder / "movekd-has-failed").touch(exist_ok=False)
        (folder.parent / f"movekd-said-{digest}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # rather twice than not at all
        return True
    return True


def _attempt_folder() -> Path | None:
    """Return where torchrun keeps what this attempt's processes of this machine leave behind."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/1/error.json
    if not error_file:
        return None
    folder = Path(error_file).parent.parent
    return folder if folder.name.startswith("attempt_") and folder.is_dir() else None
