"""Kill an action at each file that it touches."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")


def kill_at(event: int, action: Callable[[], Any], folder: str) -> bool:
    """Run ``action`` in a forked child that kills itself at its n-th open, rename, mkdir or remove.

    Args:
        event: n, from 1.
        action: what to run.
        folder: only paths that hold this text count.

    Returns:
        Whether it was killed; it was not if it did less than that.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def audit(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if name in _EVENTS:
                seen += folder in str(arguments[0])
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
