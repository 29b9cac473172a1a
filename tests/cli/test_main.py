"""What holds for every command: help with examples, JSON, completion, -q and -v."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from movekd.cli import main, output


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command with the words that call it."""
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*words, name))
    if not hasattr(command, "commands"):
        yield words, command


COMMANDS = dict(walk(typer.main.get_command(main.app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_an_example_and_every_option_a_text(words):
    command = COMMANDS[words]
    line = f"movekd {' '.join(words)}"
    assert f"Example: {line}" in command.help or (
        "Examples:" in command.help and f"\n{line} " in command.help
    )
    for parameter in command.params:
        assert parameter.help, parameter.name
        assert parameter.help.endswith((".", "?", "...")), parameter.help


@pytest.mark.parametrize("words", sorted(set(COMMANDS) - {("view",)}), ids=" ".join)
def test_whoever_prints_prints_json(words):
    assert "--json" in [option for each in COMMANDS[words].params for option in each.opts]


def test_completion_knows_the_commands():
    asked = {"_MOVEKD_COMPLETE": "complete_bash", "COMP_WORDS": "movekd cache ", "COMP_CWORD": "2"}
    code = "import sys; sys.argv[0] = 'movekd'; from movekd.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == {words[1] for words in COMMANDS if words[0] == "cache"}


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line as the shell does; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["movekd", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_quiet_and_verbose_stand_anywhere(cache_dir, monkeypatch, capsys):
    monkeypatch.setattr(output, "_PLAIN_EVERY_S", 0.0)
    verify = ("cache", "verify", str(cache_dir), "--json")
    assert call(monkeypatch, *verify) == 0
    usual = capsys.readouterr()
    assert "verify, bytes: " in usual.err
    for words in (("-q", *verify), (*verify, "--quiet")):
        assert call(monkeypatch, *words) == 0
        quiet = capsys.readouterr()
        assert quiet.err == ""
        assert json.loads(quiet.out) == json.loads(usual.out)
    assert call(monkeypatch, *verify, "-v") == 0
    verbose = capsys.readouterr()
    assert "largest process" in verbose.err.splitlines()[-1]
    assert verbose.out == usual.out
    assert not output.is_verbose() or call(monkeypatch, *verify) == 0  # said anew by each command
    assert not output.is_verbose()


def test_verbose_lets_libraries_speak():
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        output.set_verbosity(1)
        output.quiet_libraries()
        assert logging.get_verbosity() == logging.INFO
        output.set_verbosity(0)
        output.quiet_libraries()
        assert logging.get_verbosity() == logging.ERROR
    finally:
        output.set_verbosity(0)
        logging.set_verbosity(before)


def test_a_word_behind_two_dashes_stays_where_it_is():
    assert main._globals_first(["ask", "run", "-v", "--", "-q"]) == ["-v", "ask", "run", "--", "-q"]


def test_without_a_command_help_is_shown():
    assert "shards" in CliRunner().invoke(main.app, []).output
