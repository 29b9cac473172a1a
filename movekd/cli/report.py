"""`movekd report`: write one HTML file about a training run."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from movekd.cli.options import Device, Json, load_run
from movekd.cli.output import print_json, progress_bar, say
from movekd.errors import ConfigError


def report(
    run: Annotated[Path, typer.Argument(help="Output of `movekd train`, finished or not.")],
    output: Annotated[
        Path | None, typer.Option(help="The HTML file. Default: RUN/report.html.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="LLaVA JSON with questions for the model; each last turn is the right answer."
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the questions' images.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 8,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write one HTML file about a run: curves, routing, answers, config, teachers.

    The file opens from disk, without a network. Exit code 1: a file of the run holds values that
    the report leaves out; it says which.

    Examples:

    movekd report runs/finetune

    movekd report runs/finetune --questions test.json --images images/
    """
    from movekd.view.report import ask_samples, stored_answers, write_report
    from movekd.view.run_log import read_run

    if (questions is None) != (images is None):
        raise ConfigError("--questions and --images go together; give both, or neither.")
    log = read_run(run)
    answers, unread = stored_answers(run, samples)
    log = replace(log, left_out=[*log.left_out, *unread])
    if questions is not None and images is not None:
        with progress_bar() as progress:
            load = partial(load_run, run, device)
            answers = [*ask_samples(load, questions, images, samples, progress), *answers]
    path = output or run / "report.html"
    write_report(log, answers, path)
    if json:
        facts = {"report": str(path), "ended": log.is_ended, "logged_steps": len(log.steps)}
        print_json(facts | {"answers": len(answers), "left_out": log.left_out})
    else:
        say(str(path))
    if log.left_out:
        say(f"left out: {'. '.join(log.left_out)}.", err=True)
        raise typer.Exit(1)
