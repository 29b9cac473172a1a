"""End the processes of a DataLoader with the process that started them.

Input: nothing; a DataLoader calls ``end_with_parent`` in each new process (``worker_init_fn``).
"""

import multiprocessing
import os
import threading

_WATCH_S = 1.0


def end_with_parent(worker: int = 0) -> None:
    """End this process soon after the process that started it, however that one ended.

    PyTorch's own watch begins later: it takes the parent that it then finds for the right one. A
    build that was killed before would leave processes that wait for work for ever.

    Args:
        worker: number of the process; a DataLoader passes it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a process that multiprocessing started

    def watch() -> None:
        never = threading.Event()
        while os.getppid() == parent.pid:
            never.wait(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, name="movekd-parent", daemon=True).start()
