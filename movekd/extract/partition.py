"""One of n parts of a build, for machines that know nothing of each other, a SLURM array for one.

    sbatch --array=0-15 --wrap 'movekd cache build ... --partition $SLURM_ARRAY_TASK_ID/16'

Parts take turns in blocks of 1,024 rows, which are whole Zarr shards of every teacher: a Zarr shard
is of one part, whoever else is built and whatever is sealed already. Who excludes whom is in
``extract.locks``.
"""

import re
from dataclasses import dataclass

from movekd.cache import layout
from movekd.errors import ConfigError


@dataclass(frozen=True)
class Partition:
    """Part ``index`` of ``count``; the first one is 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def owns(self, shard: int, rows_per_shard: int) -> bool:
        """Return whether a Zarr shard of a teacher is of this part."""
        return shard * rows_per_shard // layout.MAX_SHARD_ROWS % self.count == self.index


def parse_partition(text: str) -> Partition:
    """Return the part that ``i/n`` names.

    Raises:
        ConfigError: it is not of that form, or there is no such part.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None:
        raise ConfigError(
            f"--partition is '{text}'; expected i/n, for one 0/16: the first of 16 parts."
        )
    index, count = int(found[1]), int(found[2])
    if count < 1:
        raise ConfigError(f"--partition is '{text}'; there is at least one part: 0/1.")
    if index >= count:
        raise ConfigError(
            f"--partition is '{text}'; the {count} parts are numbered 0 to {count - 1}. A SLURM "
            f"array starts there with --array=0-{count - 1}."
        )
    return Partition(index, count)
