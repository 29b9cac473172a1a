"""Start `movekd view`, and open its page in a browser that records requests and errors.

With ``SCREENSHOTS=DIR`` in the environment, the pictures of the docs are saved there.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

SCREENSHOTS = os.environ.get("SCREENSHOTS")
_START_S = 120  # loading PyTorch on a busy machine
VIEW = ("-m", "movekd", "view")
_HARMLESS = ("warning: Method not implemented.",)  # Gradio's own, at every upload

expect.set_options(timeout=20_000)  # the first answer of a student on a busy machine


@dataclass(frozen=True)
class Served:
    """A running `movekd view`: its port, and the file with its stderr."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@contextmanager
def serve(folder: Path, *options: str, program: Sequence[str] = VIEW) -> Iterator[Served]:
    """Run `movekd view` in a folder; require that Ctrl-C ends it with code 0 and no leftovers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uploads = folder / f"uploads-{port}"
    command = [sys.executable, *program, "--port", str(port), *options]
    log = folder / f"view-{port}.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=folder,
            text=True,
            env=os.environ | {"GRADIO_TEMP_DIR": str(uploads)},
            # a shell's background ignores Ctrl-C, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        assert process.stdout is not None
        late = threading.Timer(_START_S, process.kill)
        late.start()
        said = process.stdout.readline()  # when it can be opened, or at the end
        late.cancel()
        try:
            assert said == f"http://127.0.0.1:{port} (Ctrl-C ends it)\n", log.read_text()
            yield Served(port, log)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert [path for path in uploads.rglob("*") if path.is_file()] == []
        finally:
            process.kill()


@contextmanager
def watched(chromium: Browser, served: Served) -> Iterator[Page]:
    """Open the page; require that it asks no other host and that no error was logged."""
    before = len(served.log.read_text())
    context = chromium.new_context(viewport={"width": 1200, "height": 1000})
    asked: set[str] = set()
    said: list[str] = []
    context.on("request", lambda request: asked.add(request.url))
    context.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    context.on("weberror", lambda error: said.append(str(error.error)))
    page = context.new_page()
    page.goto(served.url)
    yield page
    context.close()
    elsewhere = [url for url in asked if not url.startswith((served.url, "data:", "blob:"))]
    assert elsewhere == []
    assert [text for text in said if text not in _HARMLESS] == []
    assert served.log.read_text()[before:] == ""


def picture(page: Page, name: str) -> None:
    """Save a screenshot if SCREENSHOTS is set."""
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / name)
