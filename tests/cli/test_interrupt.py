"""An interrupt is never lost, wherever it meets the main thread."""

import subprocess
import sys

import pytest

SCRIPTS = {
    "import": """
import interrupting
print("imported")
""",
    "destructor": """
class Interrupting:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass

Interrupting()
print("imported")
""",
    "callback": """
class Thing: pass
thing = Thing()

def callback(_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100):
        pass

reference = weakref.ref(thing, callback)
del thing
print("imported")
""",
}


@pytest.mark.parametrize("place", SCRIPTS)
def test_an_interrupt_waits_or_comes_again(tmp_path, place) -> None:
    (tmp_path / "interrupting.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nvalue = sum(range(1000))\n"
    )
    script = f"""
import os, signal, sys, threading, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(tmp_path)!r})
import movekd.cli
{SCRIPTS[place]}
try:
    threading.Event().wait(60)
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, text=True
    )
    assert (done.returncode, done.stdout) == (130, "imported\n"), done.stderr
    assert "Exception ignored" not in done.stderr
