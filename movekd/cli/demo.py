"""`movekd demo`: run both pipelines on the embedded corpus of handwritten digits."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("demo"),
    retrain: Annotated[
        bool, typer.Option(help="Train the small teachers and the language model first (minutes).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the scenes and the training.")] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON; the commands go to stderr.")
    ] = False,
) -> None:
    """Pack, plan, cache four teachers, train with and without them, evaluate: two minutes.

    The script is pipelines/digits/demo.py; it calls the commands of this tool.

    Example: movekd demo --output demo/
    """
    from movekd.resources import resource_dir
    from movekd.threads import environment_of_one_thread

    script = resource_dir("pipelines") / "digits" / "demo.py"
    arguments = ["--output", str(output), "--seed", str(seed)]
    arguments += [*(["--retrain"] if retrain else []), *(["--json"] if json else [])]
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, check=False, env=environment_of_one_thread())
    raise typer.Exit(done.returncode)
