"""`movekd evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from movekd.cli.output import print_json, print_table, progress_bar


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(help="Output of `movekd train` or `import`, or an export of format hf."),
    ],
    questions: Annotated[
        Path, typer.Option(help="LLaVA JSON whose last turns are the right answers.")
    ],
    images: Annotated[Path, typer.Option(help="Folder that the questions' images are in.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    answers: Annotated[
        Path | None, typer.Option(help="Write the answers here, in LLaVA's jsonl.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Answer the questions of a LLaVA-style file; print exact match a question type.

    Example: movekd evaluate runs/finetune --questions test.json --images images/
    """
    from movekd.cli.ask import resolve_device
    from movekd.corpus.conversations import load_conversations
    from movekd.evaluate.exact_match import exact_match, split_questions, write_answers
    from movekd.evaluate.generate import generate_answers, read_from_folder
    from movekd.student.files import load_student
    from movekd.student.vlm import quiet_libraries

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
    if json:
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
