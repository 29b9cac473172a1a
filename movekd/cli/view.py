"""`movekd view`: open a cache and a student in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from movekd.cli.options import Cache, CacheShards, Device, load_run
from movekd.cli.output import say
from movekd.errors import ConfigError


def view(
    cache: Cache = "cache",
    shards: CacheShards = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Output of `movekd train`: adds its curves and a chat with its model."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; whoever reaches it sees the cache.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    device: Device = "auto",
) -> None:
    """Show a cache in the browser and chat with a student, at http://127.0.0.1:7860.

    Needs the extra web: pip install 'movekd[web]'. A build of the cache may still run.

    Example: movekd view --cache cache/ --shards data/ --run runs/finetune
    """
    import os
    import socket
    from importlib.util import find_spec

    from movekd.corpus.index import open_corpus
    from movekd.student.checkpoint import TrainedStudent
    from movekd.view.browser import Browser
    from movekd.view.run_log import read_run

    if find_spec("gradio") is None:
        raise ConfigError("Gradio is not installed; the page needs it: pip install 'movekd[web]'.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be listened on ({error.strerror}); give a free --port."
            ) from None
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing leaves this machine
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # nor stays in the browser
    from movekd.view.gradio_app import build_page, serve

    browser = Browser(cache, None if shards is None else open_corpus(shards))
    student: TrainedStudent | None = None
    if run is not None:
        log = read_run(run)
        if (run / "model").is_dir() and log.config.get("stage") != "distill":
            student = load_run(run, device)
    page = build_page(browser, run, student)
    serve(page, host, port, lambda: say(f"http://{host}:{port} (Ctrl-C ends it)"))
