"""`movekd demo`: the whole way on the embedded corpus."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    retrain: Annotated[
        bool, typer.Option(help="Train the small teachers and the language model first (minutes).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the scenes and the training.")] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON; what is done, to stderr.")
    ] = False,
) -> None:
    """Pack, plan, cache four teachers, train with and without them, evaluate, look: a minute.

    The script is pipelines/digits/demo.py; it calls the same commands as you would.

    Example: movekd demo --output demo/
    """
    from movekd.resources import resource_dir

    script = resource_dir("pipelines") / "digits" / "demo.py"
    arguments = ["--output", str(output), "--seed", str(seed)]
    arguments += [*(["--retrain"] if retrain else []), *(["--json"] if json else [])]
    raise typer.Exit(
        subprocess.run([sys.executable, str(script), *arguments], check=False).returncode
    )
