"""The entry point of `movekd`: its commands, and how their errors are printed.

Exit codes: 0 done, 1 finished with problems, 2 could not start or had to stop, 3 a bug of movekd,
130 interrupted.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import typer

from movekd import __version__, distributed
from movekd.cli import (
    ask,
    cache,
    demo,
    doctor,
    evaluate,
    export,
    output,
    probe,
    report,
    shards,
    train,
    view,
)
from movekd.cli.aliases import Command
from movekd.cli.failures import INTERRUPTED, exit_interrupted, one_line, run_guarded

app = typer.Typer(
    name="movekd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shards.app, name="shards", help="Pipeline 1: image corpora, packed into tar shards.")
app.add_typer(cache.app, name="cache", help="Pipeline 1: teacher features on disk.")
command = partial(app.command, cls=Command)
command("train")(train.train)
command("evaluate")(evaluate.evaluate)
command("probe")(probe.probe)
command("ask")(ask.ask)
command("export")(export.export)
command("import")(export.import_)
command("report")(report.report)
command("view")(view.view)
command("doctor")(doctor.doctor)
command("demo")(demo.demo)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Also show library logs, time and memory."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Distil several vision encoders into one, from a cache of their features.

    -q, -v and --debug work anywhere on the line. `movekd COMMAND --help` shows examples.

    Exit codes: 0 done, 1 finished with problems, 2 could not start or had to stop (the line says
    what to do), 3 a bug (the line says where its traceback is), 130 interrupted.
    """
    output.set_verbosity(verbose - quiet)


def main() -> None:
    """Run the command line; whatever fails is one line, without a traceback."""
    sys.argv[1:] = _globals_first(sys.argv[1:])
    run_guarded(_main)


def _main() -> None:
    started = time.monotonic()
    code = _run()
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code
        exit_interrupted()
    if output.is_verbose():
        peak = max(resource.getrusage(who).ru_maxrss for who in _PROCESSES) * 1024 / 2**30
        took = time.monotonic() - started
        typer.echo(f"movekd: {took:.1f} s, largest process {peak:.2f} GiB", err=True)
    sys.stdout.flush()  # here, because Python ignores what fails at its exit
    sys.exit(code)


_GLOBALS = ("-q", "--quiet", "-v", "--verbose", "--debug")
_PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def _globals_first(words: Sequence[str]) -> list[str]:
    """Return the words with the global options moved to the front."""
    end = words.index("--") if "--" in words else len(words)
    first = [word for word in words[:end] if word in _GLOBALS]
    return first + [word for at, word in enumerate(words) if at >= end or word not in _GLOBALS]


def _run() -> int:
    """Run the command, print its usage errors, and return its exit code."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # of any file: typer takes it for a prompt's
            raise abort.__cause__ from None
        return INTERRUPTED
    except SystemExit as ended:  # typer's answer to a pipe that nobody reads
        if isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None
        raise
    except Exception as error:
        show: Callable[[], None] | None = getattr(error, "show", None)  # usage errors have it
        if show is None:
            raise
        if isinstance(text := getattr(error, "message", None), str):
            error.message = one_line(text)  # type: ignore[attr-defined]
        if distributed.should_print(str(error)):
            show()
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
