"""`movekd evaluate`: score a trained student by exact match or on a benchmark."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.options import Device, Json, Run, load_run
from movekd.cli.output import print_json, print_table, progress_bar
from movekd.errors import ConfigError

if TYPE_CHECKING:
    from movekd.evaluate.benchmarks.run import BenchmarkRun


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
            help="Answers file, in LLaVA's jsonl; a benchmark resumes it. Default: none; with "
            "--benchmark, RUN/answers/QUESTIONS.jsonl."
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

    Examples:

    movekd evaluate runs/finetune --questions test.json --images images/

    movekd evaluate runs/finetune --benchmark pope --questions llava_pope_test.jsonl --images
    val2014/ --annotations coco/
    """
    from movekd.evaluate.benchmarks.answers import Part
    from movekd.evaluate.benchmarks.run import MAX_NEW_TOKENS, BenchmarkRun

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
        _exact_match(
            run, questions, images, batch_size, max_new_tokens or 32, answers, device, is_json=json
        )
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
                "answers": outcome.answers,
                "questions": outcome.num_questions,
                "asked": outcome.num_asked,
                "upload": todo.submission,
            }
        )
        return
    if report is not None:
        print_table(
            f"{todo.run}: {todo.benchmark}, {report.figure} {report.value:.2f}",
            ["", *(name.replace("_", " ") for name in report.columns)],
            [
                [name, *(_cell(row.get(column)) for column in report.columns)]
                for name, row in report.rows.items()
            ],
        )
    typer.echo(f"{outcome.num_questions} answers in {outcome.answers}")
    if outcome.missing is not None:
        typer.echo(f"not scored; {outcome.missing}")


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _exact_match(
    run: Path,
    questions: Path,
    images: Path | None,
    batch_size: int,
    max_new_tokens: int,
    answers: Path | None,
    device: str,
    *,
    is_json: bool,
) -> None:
    from movekd.corpus.conversations import load_conversations
    from movekd.evaluate.exact_match import exact_match, split_questions, write_answers
    from movekd.evaluate.generate import generate_answers, read_from_folder

    if images is None:
        raise ConfigError("--images is missing; give the folder of the questions' images.")
    asked, right = split_questions(load_conversations(questions))
    trained = load_run(run, device)
    given: list[str] = []
    with progress_bar() as progress:
        for answer in generate_answers(
            trained.student,
            asked,
            read_from_folder(images),
            prompt=trained.prompt,
            geometry=trained.geometry,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        ):
            given.append(answer)
            progress("evaluate", len(given), len(asked))
    if answers is not None:
        write_answers(answers, asked, given)
    scores = exact_match(asked, right, given)
    if is_json:
        print_json(
            {
                name: asdict(s) | {"accuracy": s.accuracy, "interval": s.interval}
                for name, s in scores.items()
            }
        )
        return
    print_table(
        f"{run}: exact match",
        ["question type", "accuracy", "95% interval", "questions"],
        [
            [name, f"{s.accuracy:.3f}", f"{s.interval[0]:.3f} - {s.interval[1]:.3f}", s.total]
            for name, s in scores.items()
        ],
    )
