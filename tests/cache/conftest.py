"""The same teacher in several compressions, for the tests of what reads it."""

import numpy as np
import pytest
import zarr

from movekd.cache import layout
from movekd.cache.reader import open_cache
from movekd.corpus.index import open_corpus
from movekd.extract.run import build_cache
from stored_rows import OPTIONS, ROWS


@pytest.fixture(scope="session")
def stores(tmp_path_factory, corpus_dir, tiny_specs):
    """The "clip" teacher in Zarr shards of eight rows, one store a compressor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_SHARD_ROWS", ROWS)
        opened = {}
        for compressor in ("none", "zstd", "blosc"):
            out = tmp_path_factory.mktemp(compressor)
            spec = tiny_specs[0].with_changes(compressor=compressor)
            corpus = open_corpus(corpus_dir)
            list(build_cache(out, corpus, [spec], geometry="crop", options=OPTIONS))
            opened[compressor] = open_cache(out)["clip"]
    return opened


@pytest.fixture(scope="session")
def arrays(stores) -> dict[str, np.ndarray]:
    """Every row as stock zarr reads it."""
    group = zarr.open_group(stores["none"].storage.local_dir / "clip.zarr", mode="r")
    return {name: group[name][:] for name in stores["none"].layout.arrays}
