"""`movekd ask`."""

from pathlib import Path
from typing import Annotated

import typer


def ask(
    run: Annotated[Path, typer.Argument(help="Output of `movekd train`.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Ask a trained student about an image.

    Example: movekd ask runs/finetune cat.jpg "What is the animal doing?"
    """
    from movekd.corpus.conversations import Conversation
    from movekd.errors import ConfigError
    from movekd.evaluate.generate import generate_answers
    from movekd.student.files import load_student
    from movekd.student.vlm import quiet_libraries

    quiet_libraries()
    if not image.is_file():
        raise ConfigError(f"{image} is no file; expected an image such as a JPEG or PNG.")
    trained = load_student(run, resolve_device(device))
    conversation = Conversation("ask", (str(image),), (("human", f"<image>\n{question}"),), None)
    for answer in generate_answers(
        trained.student,
        [conversation],
        lambda _: image.read_bytes(),
        prompt=trained.prompt,
        geometry=trained.geometry,
        max_new_tokens=max_new_tokens,
    ):
        typer.echo(answer)


def resolve_device(device: str) -> str:
    """Return the device that `auto` stands for."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
