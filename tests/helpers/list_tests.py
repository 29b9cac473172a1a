"""A pytest plugin that keeps the id, file and markers of every test, before any is deselected.

``tests/conftest.py`` loads it, and ``tests/test_suite.py`` reads what it keeps: from the present
session, or from another one in the file that LIST_TESTS names.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

COLLECTED = pytest.StashKey[list[dict[str, Any]]]()
"""Key of the tests in ``config.stash``."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    tests = [
        {
            "id": item.nodeid,
            "file": item.path.relative_to(session.config.rootpath).as_posix(),
            "markers": sorted({marker.name for marker in item.iter_markers()}),
        }
        for item in items
    ]
    session.config.stash[COLLECTED] = tests
    if note := os.environ.get("LIST_TESTS"):
        Path(note).write_text(json.dumps(tests))
