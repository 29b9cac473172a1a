"""A pytest plugin that writes the id, file and markers of every test, before any is deselected.

``tests/test_suite.py`` runs it; LIST_TESTS names the file that it writes.
"""

import json
import os
from pathlib import Path

import pytest


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
    Path(os.environ["LIST_TESTS"]).write_text(json.dumps(tests))
