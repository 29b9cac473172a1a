"""Cause faults in the workers of a test cluster.

Every interpreter whose PYTHONPATH begins with this folder loads it at its start. Zarr shards then
have four rows, as in the tests, and an object-store lock that is not renewed expires in seconds.
Faults are files in the folder MOVEKD_FAULTS. A fault's content is a pattern. The first process that
is about to write a file whose name matches is hit, once:

    hold           it waits until the fault is deleted
    kill-worker    SIGKILL of the process
    kill-node*     SIGKILL of the process and its parent, Ray's daemon on that node; only on nodes
                   with MOVEKD_MORTAL in their environment

Files in the folder MOVEKD_BLIND cannot be opened, as on a machine that does not mount it.
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
    """Apply the faults whose pattern matches the file ``name``."""
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
    """Watch which files are opened."""
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
        """Apply the faults, then write the object."""
        if ".zarr/" in name:
            strike(name.replace("/", "."))
        write(self, name, buffers)

    object_storage.ObjectStorage.write = write_unless_struck
    sys.addaudithook(audit)
