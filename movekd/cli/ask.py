"""`movekd ask`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.output import quiet_libraries

if TYPE_CHECKING:
    from movekd.corpus.conversations import Role


def ask(
    run: Annotated[
        Path,
        typer.Argument(help="Output of `movekd train` or `import`, or an export of format hf."),
    ],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[
        str | None, typer.Argument(help="What to ask about it; with --chat, the first question.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Go on: a question a line on standard input, to an empty line or its end.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each answer.")
    ] = False,
) -> None:
    """Ask a trained student about an image.

    Examples:

    movekd ask runs/finetune cat.jpg "What is the animal doing?"

    movekd ask my-model cat.jpg --chat
    """
    from movekd.errors import ConfigError
    from movekd.evaluate.chat import answer
    from movekd.student.checkpoint import load_student

    quiet_libraries()
    if not image.is_file():
        raise ConfigError(f"{image} is no file; expected an image such as a JPEG or PNG.")
    if question is None and not chat:
        raise ConfigError("there is no question; give one behind the image, or --chat.")
    trained = load_student(run, resolve_device(device))
    if chat and trained.prompt == "plain":
        raise ConfigError(
            f"{run} was trained with prompt format 'plain', which knows an image and its caption "
            "alone; --chat needs a model of stage finetune."
        )
    turns: list[tuple[Role, str]] = []
    for asked in _questions(question, chat=chat):
        turns.append(("human", asked if turns else f"<image>\n{asked}"))
        said = answer(trained, image.read_bytes(), turns, max_new_tokens).text
        turns.append(("gpt", said))
        if json:
            _print_line({"question": asked, "answer": said})
        else:
            typer.echo(said)


def _questions(first: str | None, *, chat: bool) -> Iterator[str]:
    """Yield the first question, then a line of standard input each, if it is a chat."""
    if first is not None:
        yield first
    while chat:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _print_line(value: dict[str, str]) -> None:
    import json

    typer.echo(json.dumps(value, ensure_ascii=False))


def resolve_device(device: str) -> str:
    """Return the device that `auto` stands for."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
