"""Accept the old option names of each command without showing them in --help.

Input: the words behind a command. Output: the same words with today's option names. If both names
are given, the last one wins, as for an option that is given twice.
"""

from typing import Any

from typer.core import TyperCommand

RENAMED: dict[str, dict[str, str]] = {
    "build": {
        "--geometry": "--resize-mode",
        "--views": "--tiles",
        "--max-skipped": "--max-skipped-fraction",
        "--replace": "--overwrite",
        "--no-replace": "--no-overwrite",
    },
    "plan": {"--views": "--tiles"},
    "fidelity": {"--geometry": "--resize-mode", "--views": "--tiles", "--images": "--num-images"},
    "pack": {"--out": "--output"},
    "evaluate": {"--upload": "--submission", "--upload-split": "--submission-split"},
    "export": {"--out": "--output"},
    "import": {"--out": "--output"},
}
"""Command -> old name -> today's name. Names whose values changed too are hidden options."""


class Command(TyperCommand):
    """A command that also takes the old names of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words, after today's names have replaced the old ones."""
        return super().parse_args(ctx, today(self.name or "", args))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line; typer prints hidden arguments there too."""
        shown = [each for each in self.get_params(ctx) if not getattr(each, "hidden", False)]
        return ["[OPTIONS]", *(piece for each in shown for piece in each.get_usage_pieces(ctx))]


def today(command: str, words: list[str]) -> list[str]:
    """Return the words of a command line with today's option names, up to a ``--``."""
    renamed = RENAMED.get(command, {})
    end = words.index("--") if "--" in words else len(words)
    found = []
    for word in words[:end]:
        name, separator, value = word.partition("=")
        found.append(f"{renamed.get(name, name)}{separator}{value}")
    return found + words[end:]
