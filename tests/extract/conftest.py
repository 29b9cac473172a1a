"""What several tests of builds start from."""

import pytest

from builds import build


@pytest.fixture
def undisturbed(tmp_path, corpus_dir, tiny_specs, small_shards, snapshot):
    """Every file of a build that nobody interrupted."""
    build(tmp_path / "undisturbed", corpus_dir, tiny_specs)
    return snapshot(tmp_path / "undisturbed")
