"""Every `movekd` command in the documents exists and has the options that it is given."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_page import commands

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in ROOT.glob("docs/**/*.md") if path.name != "log.md"),
    *sorted(ROOT.glob("docs/**/*.sbatch")),
    *sorted(ROOT.glob("pipelines/**/README.md")),
]
TREE = dict(commands())
GLOBAL = {"-h", "--help", "-q", "--quiet", "-v", "--verbose", "--debug"}
"""Options that may stand anywhere."""
BEFORE = {"-m", "do", "then", "$", "time", "exec", ";", "&&", "||", "|", "("}
"""Words of a shell line that may stand right before a command."""
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")


def test_every_command_exists_with_its_options() -> None:
    said = {str(path.relative_to(ROOT)): problems(read(path)) for path in FILES}
    assert {path: found for path, found in said.items() if found} == {}


def test_they_are_found() -> None:
    """The search finds over a hundred calls, and each command at least once."""
    found = [words for path in FILES for words in invocations(read(path))]
    assert len(found) > 100
    named = {command_of(words) for words in found} | {"movekd shards ls"}  # the docs call it `ls`
    assert named >= {path for path in TREE if not hasattr(TREE[path], "commands")}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("    movekd train --confg a.yaml", "movekd train has no --confg"),
        ("    $ movekd train \\\n      --config a.yaml \\\n      --made-up=3", "no --made-up"),
        ("    torchrun --nproc-per-node 8 -m movekd train --made-up  # of course", "no --made-up"),
        ("    sbatch --wrap 'movekd cache build \\\n    --partition $I/16 --made-up'", "--made-up"),
        ("    for k in 1 2; do movekd evaluate run --part $k/2 --made-up; done", "no --made-up"),
        ("```sh\nmovekd --debug cache bild -x\n```", "movekd cache has no command bild"),
        ("A look with `movekd cache\nls --made-up`.", "movekd cache ls has no --made-up"),
        ("```yaml\nshards: data/  # of `movekd shards pick`\n```", "shards has no command pick"),
        ("Or `movekd made-up ...`.", "movekd has no command made-up"),
    ],
)
def test_what_does_not_exist_is_found(text: str, problem: str) -> None:
    (found,) = problems(text)
    assert problem in found


@pytest.mark.parametrize(
    "text",
    [
        "    movekd ask run cat.jpg 'Is it a cat, or --made-up?' -q | tee --append log",
        "    lmms-eval --model movekd --model_args pretrained=run",
        "    make test-web    # the page of movekd view, --made-up",
        'The hash of `sha256("movekd corpus")`.',
        "```python\nimport movekd\n```",
        "Tracebacks: `movekd --debug ...`, `movekd COMMAND --help`, `movekd cache ls [CACHE]`.",
        "In words, movekd has --made-up.",
    ],
)
def test_what_is_right_or_no_command_is_let_pass(text: str) -> None:
    assert problems(text) == []


def read(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else f"```sh\n{text}\n```\n"


def problems(text: str) -> list[str]:
    """Return a message for each wrong command in a Markdown text."""
    found = []
    for words in invocations(text):
        path = command_of(words)
        rest = [word for word in words[path.count(" ") :] if word not in GLOBAL]
        is_group = hasattr(TREE[path], "commands")
        if is_group and rest and re.fullmatch(r"[a-z][\w-]*", rest[0]):
            found.append(f"{path} has no command {rest[0]}: {' '.join(words)}")
            continue
        options = {opt for p in TREE[path].params for opt in (*p.opts, *p.secondary_opts)}
        given = [word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
        found += [f"{path} has no {o}: {' '.join(words)}" for o in given if o not in options]
    return found


def command_of(words: list[str]) -> str:
    """Return the command that the words call; the group, if the command is unknown."""
    path = "movekd"
    for word in words:
        if f"{path} {word}" not in TREE:
            break
        path = f"{path} {word}"
    return path


def invocations(text: str) -> Iterator[list[str]]:
    """Yield the words behind each call of `movekd` in a Markdown text."""
    for _, language, block in FENCE.findall(text):
        if language in ("", "sh", "bash", "console", "text"):
            yield from _called(block)
    prose = FENCE.sub("", text)
    block = "\n".join(re.findall(r"^(?: {4}|\t)(.*)$", prose, re.MULTILINE))
    yield from _called(block)
    for inline in INLINE.findall(re.sub(r"^ *```.*$", "", text, flags=re.MULTILINE)):
        yield from _called(" ".join(inline.split()))


def _called(code: str) -> Iterator[list[str]]:
    """Yield the words behind each call in lines of shell, also in quoted ones."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        words = _words(line)
        for at, word in enumerate(words):
            if word == "movekd" and (at == 0 or words[at - 1] in BEFORE):
                call = words[at + 1 :]
                end = next((i for i, w in enumerate(call) if re.fullmatch(r"[;|&<>()]+", w)), None)
                first = [w for w in call[:end] if w not in GLOBAL]  # these go before or behind
                yield first
            elif words[at - 1 : at] in (["--wrap"], ["-c"]):
                yield from _called(word)


def _words(line: str) -> list[str]:
    """Return the words and operators of a line of shell, without its comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # prose with an apostrophe
        return line.split()
