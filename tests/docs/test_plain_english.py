"""The code, the docs and the pipelines use plain English: no pattern that readers stumbled over.

Readers are in a hurry, and English is often not their first language. A regular expression finds
only a part of what is hard to read; CONTRIBUTING.md says the rest.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("movekd", "pipelines", "cache_specs", "docs")
KINDS = {".md", ".py", ".yaml", ".sbatch", ".svg"}
DATED = re.compile(r"docs/(log\.md|decisions/)")
"""Pages that keep the words of their day."""
FILES = sorted(
    path
    for path in (*(p for room in ROOMS for p in ROOT.glob(f"{room}/**/*")), *ROOT.glob("[RC]*.md"))
    if path.suffix in KINDS and path.name != "CHANGELOG.md"
)
TEXTS = [path for path in FILES if not DATED.match(path.relative_to(ROOT).as_posix())]
CODE = sorted(ROOT.glob("movekd/**/*.py"))
BREAK = re.compile(r"""["']?[ \t]*\n[ \t]*(?:\#:?|>|[fr]?["'])?[ \t]*+(?!\n)""")
"""The end of a line inside a paragraph, with what comments and strings put there."""
COUNTED = (
    "one|once|bytes|GiB|samples|images|rows|tokens|hours|seconds|weight|loss|error|scalar|line|"
    "figure|number|file|value"
)
EACH = (
    "teacher|image|step|row|token|sample|layer|process|machine|channel|shard|batch|codec|second|"
    "hour|group|view|page|run|rank|node|worker|expert|question|answer|class|head|part"
)
PATTERNS = {  # pattern -> (an example that it finds, what to write instead)
    rf"\b({COUNTED})s? an? ({EACH})\b": ("bytes an image", "'per': bytes per image"),
    r"\b(go|goes|going|gone|went) on\b": ("the build goes on", "'resume' or 'continue'"),
    r"\bunless given\b": ("32 unless given", "'Default: 32.'"),
    r"\b(comes? in|goes? out|in comes?|out (comes|goes))\b": ("Comes in: a", "'Input: ...'"),
    r"\b(of|on) (its|their|our) own\b": ("a file of its own", "'its own file'"),
    r"\bthere (is|are)\b": ("if there is a GPU", "the subject: 'if the machine has a GPU'"),
    r"\balone\b": ("images alone", "'only images', 'by itself'"),
    r"\b(one of them tells|gone on with|a lost one is|is a sentence)\b": (
        *("a lost one is a sentence", "who does what: 'Only rank 0 prints.'"),
    ),
}
GOOD = (
    "Bytes per image, per teacher and per step.",
    "The build resumes; a group of rows is one file, and each row has one scale per token.",
    "Default: 32. Input: a spec. Output: its rows.",
    "Each part gets its own file. The teachers' own grids. A standalone copy.",
    "Write one. A step later, another file.",
    "Write one\n\nA step later, another file.",
)


def problems(text: str) -> Iterator[str]:
    """Yield ``line: 'words'; write ...`` for each pattern in a text; lines may break inside it."""
    joined = BREAK.sub(lambda found: " " * len(found[0]), text)
    for pattern, (_, instead) in PATTERNS.items():
        for found in re.finditer(pattern.replace(" ", " +"), joined, re.IGNORECASE):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{line}: '{' '.join(found[0].split())}'; write {instead}"


def first_line(source: str) -> str:
    """Return the first line of a module's docstring, empty if it has none."""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def is_plain(line: str) -> bool:
    """Return whether a docstring's first line is one short sentence."""
    return bool(re.match(r"[A-Z`]", line)) and line.endswith(".") and len(line) <= 100


def test_no_pattern_is_left() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in TEXTS
        for problem in problems(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


def test_first_lines_are_short_sentences() -> None:
    found = [
        f"{path.relative_to(ROOT)}:1: '{line}'; write one sentence of at most 100 characters that "
        "starts with a capital or a `name` and ends with a period"
        for path in CODE
        if not is_plain(line := first_line(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_finds_its_example_also_over_two_lines(pattern: str) -> None:
    example, instead = PATTERNS[pattern]
    broken = [example.replace(" ", gap) for gap in ("\n", "\n    # ", ' "\n    "')]
    for text in (example, example.upper(), *broken):
        assert any(instead in problem for problem in problems(f"Words.\n{text}."))
    assert next(problems(f"Words.\n\n{example}.")).startswith("3: ")


@pytest.mark.parametrize("text", GOOD)
def test_plain_sentences_pass(text: str) -> None:
    assert list(problems(text)) == []


@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        ("Create, resume or overwrite a run directory.", True),
        ("`movekd train`: run a stage.", True),
        ("", False),
        ("lower case.", False),
        ("No period", False),
        ("Long" * 25 + ".", False),
    ],
)
def test_first_lines_are_judged(line: str, is_right: bool) -> None:
    assert is_plain(line) is is_right
