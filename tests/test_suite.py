"""Every test file is collected, and every test is run by a make target."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression

from list_tests import COLLECTED

ROOT = Path(__file__).parents[1]
HELPERS = Path(__file__).parent / "helpers"
TARGETS = ("test", "test-all", "test-web")


@dataclass(frozen=True)
class Test:
    """A collected test: its id, its file below the root, and the names of its markers."""

    __test__ = False

    id: str
    file: str
    markers: frozenset[str]


@dataclass(frozen=True)
class Selection:
    """The tests that a call of pytest runs: those below ``paths`` that ``expression`` selects."""

    paths: tuple[str, ...]
    expression: str

    def has(self, test: Test) -> bool:
        below = not self.paths or any(Path(test.file).is_relative_to(path) for path in self.paths)
        if not below or not self.expression:
            return below
        return Expression.compile(self.expression).evaluate(lambda name, **_: name in test.markers)


def collect(root: Path, note: Path) -> list[Test]:
    """Return what plain ``pytest`` collects in ``root``; ``note`` is a file for its answer."""
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "list_tests"],
        check=False,
        cwd=root,
        env=os.environ | {"LIST_TESTS": str(note), "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return read(json.loads(note.read_text()))


def read(tests: Sequence[Mapping[str, Any]]) -> list[Test]:
    return [Test(test["id"], test["file"], frozenset(test["markers"])) for test in tests]


def test_files(root: Path) -> set[str]:
    """Return every file below ``root/tests`` that is named like tests or defines one."""
    return {
        path.relative_to(root).as_posix()
        for path in (root / "tests").rglob("*.py")
        if re.fullmatch(r"test_.*|.*_test", path.stem)
        or re.search(r"^(async )?def test_|^class Test", path.read_text(), re.MULTILINE)
    }


test_files.__test__ = False


def selections(root: Path, targets: Sequence[str] = TARGETS) -> Mapping[str, Selection]:
    """Return what each make target runs, from the commands that make would run for it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    found = {}
    for target in targets:
        printed = subprocess.run(
            ["make", "--dry-run", target],
            check=True,
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
        ).stdout
        (line,) = [line for line in printed.splitlines() if " -m pytest " in line]
        words = shlex.split(line.partition(" -m pytest ")[2])
        expression, paths = "", []
        while words:
            word = words.pop(0)
            if word == "-m":
                expression = words.pop(0)
            elif word in ("-n", "--dist"):
                words.pop(0)
            else:
                assert not word.startswith("-"), f"make {target}: what does {word} select?"
                paths.append(word)
        found[target] = Selection(tuple(paths), expression)
    return found


def selected_by_none(tests: Sequence[Test], targets: Mapping[str, Selection]) -> list[str]:
    """Return the ids of the tests that no target runs."""
    return [test.id for test in tests if not any(each.has(test) for each in targets.values())]


@pytest.fixture(scope="module")
def collected(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> list[Test]:
    """All tests that plain `pytest` collects: as this session did, if it was given no path."""
    is_whole = pytestconfig.args_source is pytest.Config.ArgsSource.TESTPATHS
    if is_whole and not pytestconfig.getoption("lf", False):
        return read(pytestconfig.stash[COLLECTED])
    return collect(ROOT, tmp_path_factory.mktemp("suite") / "tests.json")


def test_every_test_file_is_collected(collected: list[Test]) -> None:
    assert test_files(ROOT) - {test.file for test in collected} == set()


def test_every_test_is_run_by_a_make_target(collected: list[Test]) -> None:
    assert selected_by_none(collected, selections(ROOT)) == []


SMALL_SUITE = {
    "pyproject.toml": """
[tool.pytest.ini_options]
testpaths = ["tests"]
markers = ["slow", "web"]
""",
    "Makefile": """
test:
	python -m pytest -n 2 -m 'not slow and not web'
test-web:
	python -m pytest -m web tests/web
""",
    "tests/build/test_folder.py": "def test_in_a_folder_that_pytest_skips(): pass",
    "tests/checks.py": "def test_in_a_file_of_another_name(): pass",
    "tests/test_plain.py": "def test_plain(): pass",
    "tests/test_slow.py": "import pytest\n\n@pytest.mark.slow\ndef test_slow(): pass",
    "tests/test_web.py": "import pytest\n\n@pytest.mark.web\ndef test_elsewhere(): pass",
    "tests/web/test_page.py": "import pytest\n\n@pytest.mark.web\ndef test_page(): pass",
}


def test_what_is_missed_is_found(tmp_path: Path) -> None:
    """The functions above find each fault in a suite that has them all."""
    for name, content in SMALL_SUITE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    tests = collect(tmp_path, tmp_path / "tests.json")
    missed = test_files(tmp_path) - {test.file for test in tests}
    assert missed == {"tests/build/test_folder.py", "tests/checks.py"}
    assert selected_by_none(tests, selections(tmp_path, ("test", "test-web"))) == [
        "tests/test_slow.py::test_slow",
        "tests/test_web.py::test_elsewhere",
    ]
