"""Pipeline 1: run the frozen teachers once over a corpus and write their features to a cache."""

from movekd.extract.options import BuildOptions
from movekd.extract.partition import Partition, parse_partition
from movekd.extract.run import BuildSummary, build_cache

__all__ = ["BuildOptions", "BuildSummary", "Partition", "build_cache", "parse_partition"]
