"""Run a command of the command line in this process."""

from typing import Any

import typer
from typer.testing import CliRunner


def invoke(app: typer.Typer, *words: Any) -> Any:
    """Return the result of a command; raise its error, as ``movekd.cli.main`` would catch it."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
