"""`movekd report`: write one HTML file about a training run, or about several."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from movekd.cli.options import Device, Json, load_run
from movekd.cli.output import print_json, progress_bar, say
from movekd.errors import ConfigError


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Output of `movekd train`, finished or not; with --compare several, each RUN or "
            "NAME=RUN.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file. Default: RUN/report.html; comparison.html with --compare."
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Compare several runs: curves, means over seeds, and differences with intervals.",
        ),
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(help="Arm that others are compared with. Default: that of the first run."),
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

    With --compare, runs whose configs differ only in their seeds are one arm; an arm is named by
    the keys in which it differs, or by NAME=RUN.

    Examples:

    movekd report runs/finetune

    movekd report runs/finetune --questions test.json --images images/

    movekd report --compare runs/none-0 runs/none-1 runs/kd-0 runs/kd-1
    """
    if (questions is None) != (images is None):
        raise ConfigError("--questions and --images go together; give both, or neither.")
    if compare:
        if questions is not None:
            raise ConfigError(
                "--questions goes with one run, and --compare with several; leave one of them out."
            )
        _compare(runs, baseline, output or Path("comparison.html"), is_json=json)
        return
    if baseline is not None:
        raise ConfigError("--baseline goes with --compare, which is not given; give both.")
    if len(runs) > 1:
        raise ConfigError(
            f"found {len(runs)} runs; expected one. Give --compare to see them on one page."
        )
    _report(Path(runs[0]), output, questions, images, samples, device, is_json=json)


def _report(
    run: Path,
    output: Path | None,
    questions: Path | None,
    images: Path | None,
    samples: int,
    device: str,
    *,
    is_json: bool,
) -> None:
    from movekd.view.report import ask_samples, stored_answers, write_report
    from movekd.view.run_log import read_run

    log = read_run(run)
    answers, unread = stored_answers(run, samples)
    log = replace(log, left_out=[*log.left_out, *unread])
    if questions is not None and images is not None:
        with progress_bar() as progress:
            load = partial(load_run, run, device)
            answers = [*ask_samples(load, questions, images, samples, progress), *answers]
    path = output or run / "report.html"
    write_report(log, answers, path)
    if is_json:
        facts = {"report": str(path), "ended": log.is_ended, "logged_steps": len(log.steps)}
        print_json(facts | {"answers": len(answers), "left_out": log.left_out})
    else:
        say(str(path))
    _end(log.left_out)


def _compare(runs: list[str], baseline: str | None, path: Path, *, is_json: bool) -> None:
    from movekd.view.arms import read_compared
    from movekd.view.compare_page import comparison_json, write_comparison
    from movekd.view.comparison import compare_runs

    found = [read_compared(run) for run in runs]
    comparison = compare_runs(found, baseline)
    write_comparison(comparison, path)
    if is_json:
        print_json({"report": str(path)} | comparison_json(comparison))
    else:
        say(*(f"movekd: {note}" for note in comparison.notes), err=True)
        say(str(path))
    _end([what for run in found for what in run.log.left_out])


def _end(left_out: Sequence[str]) -> None:
    """Say what was left out, and exit with 1 if anything was."""
    if left_out:
        say(f"left out: {'. '.join(left_out)}.", err=True)
        raise typer.Exit(1)
