"""Write reference/cli.md: every command of `movekd` with its arguments, options and examples.

Input: the command tree that Typer builds, so the page says what ``--help`` says. Typer contains its
own copy of Click; tools for Click's commands do not recognise it.
"""

import re
from collections.abc import Iterator
from typing import Any

import typer

from movekd.cli.main import app

_HEAD = """# Commands

The `--help` of every command. `-q`, `-v` and `--debug` work anywhere on the line.
"""


def cli_page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_HEAD, *(_section(path, command) for path, command in commands())])


def commands() -> Iterator[tuple[str, Any]]:
    """Yield every command and group of commands as (``movekd cache build``, its object)."""
    yield from _below("movekd", typer.main.get_command(app))


def _below(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _below(f"{path} {name}", child)


def _section(path: str, command: Any) -> str:
    """Return one command's section of the page."""
    context = typer.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    prose, examples = _prose_and_examples(command.help or "")
    parts = [f"## {path}", *prose, f"```text\n{usage}\n```"]
    if children := getattr(command, "commands", {}):
        parts.append("\n".join(_link(f"{path} {name}", child) for name, child in children.items()))
    rows = [row for parameter in command.params if (row := _row(parameter, context))]
    if rows:
        parts.append("\n".join(["| option | default | meaning |", "|---|---|---|", *rows]))
    parts += [f"```sh\n{example}\n```" for example in examples]
    return "\n\n".join(parts) + "\n"


def _link(path: str, command: Any) -> str:
    """Return a list item that links to a command's section."""
    first = " ".join((command.help or "").partition("\n\n")[0].split())
    return f"- [{path}](#{path.replace(' ', '-')}): {escaped(first)}"


def _prose_and_examples(text: str) -> tuple[list[str], list[str]]:
    """Return the paragraphs of a help text as Markdown, and its example commands."""
    prose, examples = [], []
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        if line.startswith(("Example: ", "movekd ")):
            examples.append(line.removeprefix("Example: "))
        elif line and line != "Examples:":
            prose.append(escaped(line))
    return prose, examples


def _row(parameter: Any, context: typer.Context) -> str:
    """Return the table row of an argument or option; a hidden one has none."""
    if (record := parameter.get_help_record(context)) is None:
        return ""
    names, text = record
    text, default = _without_default(text)
    return f"| `{names.replace(' range>', '>')}` | {default} | {escaped(text)} |"


def _without_default(text: str) -> tuple[str, str]:
    """Split a help text from Typer's suffix: ``[default: 32; x>=1]``, ``[required]``."""
    found = re.fullmatch(r"(.*?)\s*\[((?:default: |required|x>=|\d).*)\]", text, re.DOTALL)
    if found is None:
        return text, ""
    default = ""
    for extra in found[2].split("; "):
        if extra == "required":
            default = "needed"
        elif extra.startswith("default: ") and not extra.startswith("default: no-"):
            default = f"`{extra.removeprefix('default: ').strip('()')}`"
    return found[1], default


def escaped(text: str) -> str:
    """Return plain text escaped for Markdown; text in backticks stays code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_<>|\[\]])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part.replace("|", r"\|") for part in parts[1::2]]
    return "`".join(parts)
