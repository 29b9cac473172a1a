"""Build a cache in one call, with the options that most tests use."""

from movekd.corpus.index import open_corpus
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache

OPTIONS = BuildOptions(batch_size=5, num_workers=0)


def build(out, data, specs, *, geometry="crop", options=OPTIONS, **more):
    """Build a cache and return the summaries of its teachers."""
    return list(
        build_cache(out, open_corpus(data), specs, geometry=geometry, options=options, **more)
    )
