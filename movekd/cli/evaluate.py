"""`movekd evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.output import print_json, print_table, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from movekd.evaluate.benchmarks.run import BenchmarkRun
    from movekd.student.checkpoint import TrainedStudent


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(help="Output of `movekd train` or `import`, or an export of format hf."),
    ],
    questions: Annotated[
        Path,
        typer.Option(
            help="LLaVA JSON whose last turns are the right answers; with --benchmark its own file."
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that the questions' images are in; mmbench's hold theirs."),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="pope, textvqa, gqa, sqa, vqav2, vizwiz, mme or mmbench, as LLaVA's."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="The benchmark's right answers: coco/ of pope, TextVQA_0.5.1_val.json, "
            "testdev_balanced_questions.json of gqa, folder of sqa's problems.json, annotations of "
            "vqav2, val.json of vizwiz, folder of mme (else --images)."
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Write the answers here, in LLaVA's jsonl. A benchmark always does, to "
            "RUN/answers/ unless told, and goes on from what is there."
        ),
    ] = None,
    upload: Annotated[
        Path | None,
        typer.Option(help="Write what the server of gqa, vqav2, vizwiz or mmbench takes."),
    ] = None,
    upload_split: Annotated[
        Path | None,
        typer.Option(help="vqav2: question file of the whole split, which its server wants."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="K/N: answer every N-th question only; afterwards run without it."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer: 32, of benchmarks 128, unless given.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Answer the questions of a LLaVA-style file; print exact match, or a benchmark's own figures.

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
            "--upload": upload,
            "--upload-split": upload_split,
            "--part": part,
        }.items():
            _refuse_without_benchmark(option, value)
        _exact_match(
            run, questions, images, batch_size, max_new_tokens or 32, answers, device, is_json=json
        )
        return
    todo = BenchmarkRun(
        run=run,
        benchmark=benchmark,
        questions=questions,
        images=images,
        annotations=annotations,
        answers=answers,
        upload=upload,
        upload_split=upload_split,
        part=None if part is None else Part.parse(part),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
    )
    _benchmark(todo, device, is_json=json)


def _refuse_without_benchmark(option: str, value: object) -> None:
    from movekd.errors import ConfigError

    if value is not None:
        raise ConfigError(
            f"{option} goes with --benchmark, which is not given; name one, or leave {option} out "
            "for exact match."
        )


def _benchmark(todo: "BenchmarkRun", device: str, *, is_json: bool) -> None:
    from movekd.cli.ask import resolve_device
    from movekd.evaluate.benchmarks.run import run_benchmark

    def load() -> "TrainedStudent":
        from movekd.student.checkpoint import load_student

        quiet_libraries()
        return load_student(todo.run, resolve_device(device))

    with progress_bar() as progress:
        outcome = run_benchmark(todo, load, progress)
    report = outcome.report
    if is_json:
        print_json(
            {
                "benchmark": todo.benchmark,
                "figure": None
                if report is None
                else {"name": report.figure, "value": report.value},
                "rows": None if report is None else report.rows,
                "answers": str(outcome.answers),
                "questions": outcome.num_questions,
                "asked": outcome.num_asked,
                "upload": None if todo.upload is None else str(todo.upload),
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
    from movekd.cli.ask import resolve_device
    from movekd.corpus.conversations import load_conversations
    from movekd.errors import ConfigError
    from movekd.evaluate.exact_match import exact_match, split_questions, write_answers
    from movekd.evaluate.generate import generate_answers, read_from_folder
    from movekd.student.checkpoint import load_student

    if images is None:
        raise ConfigError("--images is missing; give the folder that the questions' images are in.")

    quiet_libraries()
    asked, right = split_questions(load_conversations(questions))
    trained = load_student(run, resolve_device(device))
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
                name: {
                    "accuracy": s.accuracy,
                    "correct": s.correct,
                    "total": s.total,
                    "interval": s.interval,
                }
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
