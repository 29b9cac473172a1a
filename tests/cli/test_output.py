import json
import re
from pathlib import Path

import pytest

from movekd.cli import output


def test_plain_progress_tells_rate_and_end_of_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0, 20.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    with output.progress_bar() as progress:
        for done in (1, 2, 55, 60, 100):
            progress("build", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["build: 55/100, 5.0/s, 9 s left", "build: 100/100, 5.0/s, 0 s left"]


def test_plain_progress_says_nothing_of_what_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress_bar() as progress:
        progress("pack images", 3, 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (10e12, "10.00 TB"), (2e18, "2000.00 PB")],
)
def test_sizes_are_powers_of_ten(num_bytes: float, text: str) -> None:
    assert output.size(num_bytes) == text


ODD = "a\x1b[31m\x9b2Jb\u202ec\udc80文"


def test_only_the_functions_here_print(capsys: pytest.CaptureFixture[str]) -> None:
    """Names from files reach a terminal through ``say``, tables and JSON; never as they are."""
    raw = {"output.py", "failures.py", "main.py"}  # the version, seconds, and what is escaped
    for path in Path(output.__file__).parent.glob("*.py"):
        if path.name not in raw:
            assert not re.search(r"\becho\b|(?<![\w.])print\(", path.read_text()), path.name
    output.say(ODD, "two", err=True)
    output.print_text("a\x1b[31m\x9b2Jb\n\tc\u200dd")
    printed = capsys.readouterr()
    assert printed.err == "a\\x1b[31m\\x9b2Jb\\u202ec\\udc80文\ntwo\n"
    assert printed.out == "a\\x1b[31m\\x9b2Jb\n\tc\u200dd\n"


def test_no_table_and_no_json_prints_what_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.print_table(ODD, [ODD], [[ODD], ["two\nlines"]])
    for indent in (1, None):
        output.print_json({ODD: ODD}, indent=indent)
    printed = capsys.readouterr().out
    assert all(map(str.isprintable, printed.splitlines()))
    *table, last = printed.splitlines()
    assert json.loads(last) == {ODD: ODD}
    assert any("文" in line for line in table)
    assert "two" in printed
