"""Tests of movekd.cli.aliases: every old spelling works and none is shown."""

import pytest
import typer

from movekd.cli import main
from movekd.cli.aliases import RENAMED, today
from movekd.cli.options import one_cache
from movekd.errors import ConfigError

NEEDED = {
    "build": ["--teacher", "clip", "--shards", "data"],
    "plan": ["--teacher", "clip", "--shards", "data"],
    "fidelity": ["--teacher", "clip", "--shards", "data"],
    "evaluate": ["run", "--questions", "q.json"],
    "export": ["run", "--format", "hf"],
    "import": ["released"],
    "pack": [],
    "ls": [],
    "verify": [],
}
VALUES = {"--images": "3", "--max-skipped": "0.5", "--out": "a", "--replace": None}
VALUES |= {"--no-replace": None}
PAIRS = [(name, old, new) for name, table in RENAMED.items() for old, new in table.items()]


def _commands(command):
    found = {}
    for name, below in getattr(command, "commands", {}).items():
        found |= _commands(below) if hasattr(below, "commands") else {name: below}
    return found


ROOT = typer.main.get_command(main.app)
COMMANDS = _commands(ROOT) | {"ls": ROOT.commands["cache"].commands["ls"]}


def parsed(name, *words):
    """Return the values of a command's parameters, without running it."""
    output = ["--output", "o"] if name in ("export", "import") and "--out" not in words else []
    return COMMANDS[name].make_context(name, [*NEEDED[name], *output, *words]).params


def words_of(option, value):
    return [option] if value is None else [option, value]


@pytest.mark.parametrize(("name", "old", "new"), PAIRS)
def test_an_old_name_has_the_value_of_the_new_one(name, old, new):
    value = VALUES.get(old, "x")
    expected = parsed(name, *words_of(new, value))
    assert parsed(name, *words_of(old, value)) == expected
    if value is not None:
        assert parsed(name, f"{old}={value}") == expected
    assert expected[new.strip("-").removeprefix("no-").replace("-", "_")] not in (None, "o")


@pytest.mark.parametrize(("name", "old", "new"), PAIRS)
def test_of_an_old_and_a_new_name_the_last_one_wins(name, old, new):
    if (value := VALUES.get(old, "x")) is None:
        assert parsed(name, old, new) == parsed(name, new)
        return
    other = "7" if old == "--images" else "0.25" if old == "--max-skipped" else "y"
    assert parsed(name, old, value, new, other) == parsed(name, new, other)
    assert parsed(name, new, other, old, value) == parsed(name, new, value)


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_help_shows_no_old_name(name):
    context = typer.Context(COMMANDS[name], info_name=name)
    words = {word.strip("[],.;:()") for word in COMMANDS[name].get_help(context).split()}
    assert not words & {"--recipe", "--part", "CACHE", *RENAMED.get(name, {})}
    assert words >= set(RENAMED.get(name, {}).values()) - {"--no-overwrite"}


def test_words_behind_two_dashes_are_no_options():
    assert today("pack", ["--out", "a", "--", "--out"]) == ["--output", "a", "--", "--out"]


@pytest.mark.parametrize("name", ["ls", "verify"])
def test_the_cache_may_still_be_an_argument(name):
    values = parsed(name, "there")
    assert (values["positional"], values["cache"]) == ("there", "cache")
    assert parsed(name, "--cache", "there")["cache"] == "there"


def test_two_different_caches_are_refused():
    assert one_cache("cache", None) == "cache"
    assert one_cache("cache", "there") == one_cache("there", "there") == "there"
    with pytest.raises(ConfigError, match="found two caches, 'there' and --cache here"):
        one_cache("here", "there")
