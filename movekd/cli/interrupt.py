"""Make Ctrl-C end a command, also while modules are imported.

Python raises KeyboardInterrupt wherever the main thread is. Inside a callback of the import lock, a
``__del__`` or a weak reference it is printed and forgotten; inside the start of a native library it
aborts the process. So it waits until an import has ended, and one that was forgotten comes again.
``movekd.cli`` installs this before the slow imports.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

RETRY_S = 0.05
_IMPORT = "<frozen importlib"


def install() -> None:
    """Replace Python's handler of SIGINT, in the main thread and if no other one was set."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _again_if_forgotten


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or try again soon while a module is imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORT):
            _again()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _again() -> None:
    timer = threading.Timer(RETRY_S, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()


def _again_if_forgotten(unraisable: Any) -> None:
    """Send an interrupt again that an uncatchable place has swallowed; print other errors."""
    if unraisable.exc_type is KeyboardInterrupt:
        _again()
    else:
        sys.__unraisablehook__(unraisable)
