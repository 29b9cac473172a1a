"""Generate the reference pages of the site from the code.

MkDocs calls ``on_files``, which adds the generated pages: the commands (``cli_page``) and the
public names of each room, which mkdocstrings fills in. mkdocs.yml lists them in its navigation. The
keys of the YAML files (``config_page``) are a committed page, for readers of the repository.
"""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from cli_page import cli_page

ROOMS = {
    "corpus": ("movekd.corpus",),
    "cache": ("movekd.cache",),
    "teachers": ("movekd.teachers",),
    "student": ("movekd.student",),
    "distill": ("movekd.distill",),
    "extract": ("movekd.extract",),
    "analysis": ("movekd.analysis",),
    "train": ("movekd.train",),
    "evaluate": (
        "movekd.evaluate",
        "movekd.evaluate.benchmarks",
        "movekd.evaluate.chat",
        "movekd.evaluate.generate",
        "movekd.evaluate.exact_match",
    ),
}
"""Page -> its modules; a module without ``__all__`` shows all public names."""

_LETTERS = (
    "Capitals at the end of a name are the tensor's dimensions, such as `tokens_BND`: B batch, "
    "N tokens, D channels, H heads, T teachers, L layers, E experts."
)
_NOTES = {
    "cache": f"{_LETTERS}\n\nThe fields of `CacheSpec` are "
    "[the keys of a teacher's file](config.md#a-teachers-yaml-file).",
    "teachers": _LETTERS,
    "student": _LETTERS,
    "distill": _LETTERS,
    "train": "The fields of `TrainConfig` are [the keys of student.yaml](config.md#studentyaml).",
}
"""Page -> text above its names."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those in docs/."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Return the generated pages, path in docs/ -> Markdown."""
    rooms = {f"reference/{room}.md": api_page(room) for room in ROOMS}
    return {"reference/cli.md": cli_page()} | rooms


def api_page(room: str) -> str:
    """Return the page of a room: its directives for mkdocstrings."""
    first, *others = ROOMS[room]
    parts = [f"# {first}", _NOTES.get(room, ""), f"::: {first}"]
    parts += [f"## {module}\n\n::: {module}" for module in others]
    return "\n\n".join(filter(None, parts)) + "\n"
