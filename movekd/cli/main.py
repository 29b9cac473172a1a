"""`movekd`: the commands, and how their errors are shown.

Exit codes: 0 done, 1 finished with problems, 2 could not start, 130 interrupted.
"""

import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from movekd import __version__, processes
from movekd.cli import ask, cache, demo, doctor, evaluate, export, report, shards, train, view
from movekd.errors import MovekdError

app = typer.Typer(
    name="movekd",
    help="Distil several vision encoders into one, from a cache of their features.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(shards.app, name="shards", help="Image corpora: pack and look.")
app.add_typer(cache.app, name="cache", help="Pipeline 1: features of teachers, on disk.")
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("ask")(ask.ask)
app.command("export")(export.export)
app.command("import")(export.import_)
app.command("report")(report.report)
app.command("view")(view.view)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Distil several vision encoders into one, from a cache of their features."""


def main() -> None:
    """Run the command line; a MovekdError is a sentence, not a traceback."""
    try:
        code = _run()
    except MovekdError as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error), 2)
    except OSError as error:  # of whatever place nobody has thought of
        if "--debug" in sys.argv:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}. Check the path, its rights and the disk.", 2)
    except RuntimeError as error:
        if "--debug" in sys.argv or type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(
            f"the device is out of memory: {str(error).splitlines()[0]} Give a smaller batch size, "
            "or free the device. A teacher keeps the batch size that its calibration settled; "
            "--replace it to change that.",
            2,
        )
    if code == 130:  # what typer makes of Ctrl-C
        _fail(
            "interrupted. What is sealed or saved stays; run the same command again to go on "
            "(`train` with --resume, `cache build` without --replace).",
            130,
        )
    sys.exit(code)


def _run() -> int:
    """Run the command; return its exit code. Words that it does not take are shown here."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        return 1
    except Exception as error:
        show: Callable[[], None] | None = getattr(error, "show", None)  # typer's own have it
        if show is None:
            raise
        if processes.is_news(str(error)):
            show()
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


def _fail(sentence: str, code: int) -> NoReturn:
    if processes.is_news(sentence):  # of several processes, one speaks
        typer.echo(f"movekd: {sentence}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
