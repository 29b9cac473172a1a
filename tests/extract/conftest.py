"""What several tests of builds start from."""

import pytest

from builds import build
from movekd.corpus.pack import pack_folder


@pytest.fixture
def undisturbed(tmp_path, corpus_dir, tiny_specs, small_shards, snapshot):
    """Every file of a build that nobody interrupted."""
    build(tmp_path / "undisturbed", corpus_dir, tiny_specs)
    return snapshot(tmp_path / "undisturbed")


@pytest.fixture
def grown(tmp_path, crops):
    """A corpus of ten images, and the same with three more."""
    for count in (10, 13):
        (tmp_path / f"{count}").mkdir()
        for number in range(count):
            crops[number].save(tmp_path / f"{count}" / f"{number:02d}.png")
        pack_folder(tmp_path / f"{count}", tmp_path / f"data{count}", num_workers=1)
    return tmp_path / "data10", tmp_path / "data13"
