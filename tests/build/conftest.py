"""What several tests of builds start from."""

import shutil
from pathlib import Path

import pytest
from builds import build

from movekd.corpus.index import open_corpus


@pytest.fixture
def damaged_corpus(tmp_path: Path, corpus_dir: Path) -> tuple[Path, int]:
    """A copy of the corpus whose shard was damaged after packing, and the image that it hit."""
    data = tmp_path / "damaged"
    shutil.copytree(corpus_dir, data)
    position = 11
    image = open_corpus(data).index.slice(position, 1).to_pylist()[0]
    with (data / image["shard"]).open("r+b") as shard:
        shard.seek(image["offset"])
        shard.write(bytes(image["size"]))
    return data, position


@pytest.fixture
def undisturbed(tmp_path, corpus_dir, tiny_specs, small_shards, snapshot):
    """Every file of a build that nobody interrupted."""
    build(tmp_path / "undisturbed", corpus_dir, tiny_specs)
    return snapshot(tmp_path / "undisturbed")
