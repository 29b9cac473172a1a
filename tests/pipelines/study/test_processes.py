"""Worker processes end with the study: the next study would make the same runs beside them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import demo

WAITING = """
import os, signal, sys
from study.processes import pool_of

if __name__ == "__main__":
    # a shell that starts the tests in its background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pool_of(1) as pool:
            working = pool.submit(signal.pause)
            while not working.running():
                pass
            print("works", flush=True)
            working.result()
    except KeyboardInterrupt:
        os._exit(130)  # as the command does: Python would wait for what it works at
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_its_processes_end_with_it(tmp_path, how):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    paths = [str(demo.HERE), str(Path(__file__).parents[3])]
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": ":".join(paths), "PATH": ""},
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()  # its process works
        process.send_signal(how)
        try:
            left, _ = process.communicate(timeout=60)  # ends when nobody holds it any longer
        finally:
            process.kill()
    assert left == b""
