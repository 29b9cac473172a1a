"""Loaded at the start of every interpreter whose PYTHONPATH begins here: workers of a test cluster.

Zarr shards have four rows, as in the tests; in an object store a lock that is not renewed is taken
over after seconds. Faults are files in the folder that MOVEKD_FAULTS names. What is in one is a
pattern; whoever is about to write the first file with a name that matches is hit, once:

    hold           does not go on until somebody deletes the fault
    kill-worker    kill -9 of the process that writes
    kill-node*     kill -9 of the process that started it, Ray's daemon on that node, and of itself;
                   on nodes with MOVEKD_MORTAL in their environment

MOVEKD_BLIND is a folder whose files cannot be opened, as on a machine that does not mount it.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

FAULTS, BLIND = os.environ.get("MOVEKD_FAULTS"), os.environ.get("MOVEKD_BLIND")
MORTAL = "MOVEKD_MORTAL" in os.environ


def strike(name: str) -> None:
    """Let the faults happen that are for whoever writes the file ``name``."""
    for fault in sorted(Path(str(FAULTS)).iterdir()):
        try:
            is_of_node = fault.name.startswith("kill-node")
            if not re.search(fault.read_text(), name) or (is_of_node and not MORTAL):
                continue
            while fault.name == "hold" and fault.exists():
                time.sleep(0.05)
            fault.unlink()
        except FileNotFoundError:
            continue  # it has hit another process
        if is_of_node:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def audit(event: str, arguments: tuple[object, ...]) -> None:
    """See which files are opened."""
    if event != "open" or not isinstance(arguments[0], str | os.PathLike):
        return
    path = os.fspath(arguments[0])
    if BLIND and path.startswith(BLIND):
        raise FileNotFoundError(2, "No such file or directory", path)
    if FAULTS and path.endswith(".tmp") and ".zarr." in path:
        strike(path)


if FAULTS:
    from movekd.cache import layout, object_storage
    from movekd.extract import locks

    layout.MAX_SHARD_ROWS = 4
    locks.RENEW_S, locks.STALE_S = 0.3, 4.0
    write = object_storage.ObjectStorage.write

    def write_unless_struck(self, name, buffers):
        """Write an object, if the process lives to do it."""
        if ".zarr/" in name:
            strike(name.replace("/", "."))
        write(self, name, buffers)

    object_storage.ObjectStorage.write = write_unless_struck
    sys.addaudithook(audit)
