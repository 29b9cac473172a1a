"""`movekd ask`: ask a trained student about one image."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.options import Device, Run, load_run
from movekd.cli.output import print_json, print_text
from movekd.errors import ConfigError, shorten
from movekd.files.reading import MIB, read_bytes

if TYPE_CHECKING:
    from movekd.corpus.conversations import Role

_MAX_IMAGE_BYTES = 512 * MIB


def ask(
    run: Run,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[
        str | None, typer.Argument(help="The question; with --chat, the first one.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Read further questions from standard input, one per line."),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum new tokens per answer.")
    ] = 256,
    device: Device = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON per answer.")
    ] = False,
) -> None:
    """Ask a trained student about an image.

    Examples:

    movekd ask runs/finetune cat.jpg "What is the animal doing?"

    movekd ask my-model cat.jpg --chat
    """
    from movekd.corpus.decode import probe_image
    from movekd.evaluate.chat import answer

    if re.match(r"(https?|ftp|s3|gs|file|data):", str(image), re.IGNORECASE):
        raise ConfigError(
            f"{shorten(image)} is an address; movekd loads no image from the network. Download "
            "it, and give the file."
        )
    pixels = read_bytes(image, max_bytes=_MAX_IMAGE_BYTES, remedy="Give an image file.")
    if question is None and not chat:
        raise ConfigError("the question is missing; give it after the image, or give --chat.")
    probe_image(pixels)  # before the model loads
    trained = load_run(run, device)
    if chat and trained.prompt == "plain":
        raise ConfigError(
            f"{run} was trained with prompt format 'plain', which holds only an image and its "
            "caption; --chat needs a model of stage finetune."
        )
    turns: list[tuple[Role, str]] = []
    for asked in _questions(question, chat=chat):
        turns.append(("human", asked if turns else f"<image>\n{asked}"))
        said = answer(trained, pixels, turns, max_new_tokens).text
        turns.append(("gpt", said))
        if json:
            print_json({"question": asked, "answer": said}, indent=None)
        else:
            print_text(said)


def _questions(first: str | None, *, chat: bool) -> Iterator[str]:
    """Yield the first question; in a chat, then each line of standard input."""
    if first is not None:
        yield first
    while chat:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
