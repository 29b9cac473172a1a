"""`movekd evaluate`: score a trained student by exact match or on a benchmark."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.evaluate_table import (
    comparison_json,
    comparison_lines,
    intervals_json,
    print_report,
)
from movekd.cli.options import Device, Json, Run, load_run
from movekd.cli.output import print_json, print_table, progress_bar, say
from movekd.errors import ConfigError

if TYPE_CHECKING:
    from movekd.evaluate.benchmarks.run import BenchmarkRun
    from movekd.evaluate.exact_match_run import ExactMatchRun


def evaluate(
    run: Run,
    questions: Annotated[
        Path,
        typer.Option(
            help="LLaVA JSON whose last turns are the right answers; with --benchmark, its "
            "question file."
        ),
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of the questions' images.")] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="Name of a benchmark, such as pope, gqa or mme; a wrong name lists all."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="The benchmark's right answers; without it, the command names the file."),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Answers file, in LLaVA's jsonl, written as answers come; the same command "
            "resumes it. Default: none; with --benchmark, RUN/answers/QUESTIONS.jsonl."
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Answers file of a second model to the same questions, such as "
            "OTHER_RUN/answers/QUESTIONS.jsonl: print the difference with its 95% interval and a "
            "paired test."
        ),
    ] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Write the file for the benchmark's server.")
    ] = None,
    submission_split: Annotated[
        Path | None,
        typer.Option(help="vqav2: question file of the whole split, for its server."),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="i/n: answer part i of n, counted from 0; at the end, run without it to score."
        ),
    ] = None,
    part: Annotated[
        str | None, typer.Option(hidden=True, help="Old form of --partition, counted from 1.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 32,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum new tokens. Default: 32 (128 with --benchmark)."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Answer the questions of a file; print exact match, or a benchmark's figures.

    Intervals are over test images.

    Examples:

    movekd evaluate runs/finetune --questions test.json --images images/

    movekd evaluate runs/finetune --benchmark pope --questions llava_pope_test.jsonl --images
    val2014/ --annotations coco/ --baseline runs/base/answers/llava_pope_test.jsonl
    """
    from movekd.evaluate.benchmarks.answers import Part
    from movekd.evaluate.benchmarks.run import MAX_NEW_TOKENS, BenchmarkRun
    from movekd.evaluate.exact_match_run import ExactMatchRun

    if benchmark is None:
        for option, value in {
            "--annotations": annotations,
            "--submission": submission,
            "--submission-split": submission_split,
            "--partition": partition or part,
        }.items():
            if value is not None:
                raise ConfigError(
                    f"{option} goes with --benchmark, which is not given; name one, or leave "
                    f"{option} out for exact match."
                )
        if images is None:
            raise ConfigError("--images is missing; give the folder of the questions' images.")
        tokens = max_new_tokens or 32
        whole = ExactMatchRun(run, questions, images, answers, batch_size, tokens, baseline)
        _exact_match(whole, device, is_json=json)
        return
    if part is not None and partition is not None:
        raise ConfigError("--part is the old form of --partition; give only --partition.")
    chosen = None if partition is None else Part.parse(partition)
    if part is not None:
        chosen = Part.parse(part, option="--part", first=1)
    todo = BenchmarkRun(
        run=run,
        benchmark=benchmark,
        questions=questions,
        images=images,
        annotations=annotations,
        answers=answers,
        submission=submission,
        submission_split=submission_split,
        part=chosen,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
        baseline=baseline,
    )
    _benchmark(todo, device, is_json=json)


def _benchmark(todo: "BenchmarkRun", device: str, *, is_json: bool) -> None:
    from movekd.evaluate.benchmarks.run import run_benchmark

    with progress_bar() as progress:
        outcome = run_benchmark(todo, lambda: load_run(todo.run, device), progress)
    report = outcome.report
    if is_json:
        print_json(
            {
                "benchmark": todo.benchmark,
                "figure": report and {"name": report.figure, "value": report.value},
                "rows": report and report.rows,
                "intervals": report and report.sample and intervals_json(report.sample),
                "comparison": comparison_json(outcome.comparison, outcome.baseline),
                "answers": outcome.answers,
                "questions": outcome.num_questions,
                "asked": outcome.num_asked,
                "upload": todo.submission,
            }
        )
        return
    if report is not None:
        print_report(f"{todo.run}: {todo.benchmark}, {report.figure}", report)
    for line in comparison_lines(outcome.comparison, outcome.baseline):
        say(line)
    say(_stored(outcome.num_questions, outcome.num_asked, outcome.answers))
    if outcome.missing is not None:
        say(f"not scored; {outcome.missing}", "no interval: nothing is scored here")


def _exact_match(todo: "ExactMatchRun", device: str, *, is_json: bool) -> None:
    from movekd.evaluate.exact_match_run import run_exact_match
    from movekd.evaluate.sample import ALL

    with progress_bar() as progress:
        outcome = run_exact_match(todo, lambda: load_run(todo.run, device), progress)
    scores = outcome.scores
    if is_json:
        found = {
            name: asdict(s) | {"accuracy": s.accuracy, "interval": outcome.interval(name)}
            for name, s in scores.items()
        }
        found[ALL] |= {
            "intervals": f"95%, {outcome.about}",
            "images": outcome.sample.num_images,
            "comparison": comparison_json(outcome.comparison, outcome.baseline),
        }
        print_json(found)
        return
    print_table(
        f"{todo.run}: exact match",
        ["question type", "accuracy", "95% interval", "questions"],
        [
            [name, f"{s.accuracy:.3f}", "{:.3f} - {:.3f}".format(*outcome.interval(name)), s.total]
            for name, s in scores.items()
        ],
    )
    say(f"95% intervals {outcome.about}")
    for line in comparison_lines(outcome.comparison, outcome.baseline):
        say(line)
    if todo.answers is not None:
        say(_stored(outcome.num_questions, outcome.num_asked, todo.answers))


def _stored(num_questions: int, num_asked: int, path: Path) -> str:
    """Return the line about the answers file; says what an earlier run had left."""
    earlier = num_questions - num_asked
    said = f", {earlier} of them given before" if earlier else ""
    return f"{num_questions} answers in {path}{said}"
