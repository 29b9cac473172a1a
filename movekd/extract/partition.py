"""Split a build into n parts for machines that do not know each other, such as a SLURM array.

    sbatch --array=0-15 --wrap 'movekd cache build ... --partition $SLURM_ARRAY_TASK_ID/16'

Parts take turns in blocks of 1,024 rows. A block holds whole Zarr shards of every teacher, so a
Zarr shard belongs to one part, whatever else is built or sealed. ``extract.locks`` says which
builds exclude each other.
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
        """Return whether a Zarr shard of a teacher belongs to this part."""
        return shard * rows_per_shard // layout.MAX_SHARD_ROWS % self.count == self.index


WHOLE = Partition(0, 1)
"""A build that is not split."""


def parse_partition(text: str) -> Partition:
    """Return the part that ``i/n`` names.

    Raises:
        ConfigError: the text has another form, or no such part exists.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None:
        raise ConfigError(
            f"--partition is '{text}'; expected i/n, such as 0/16 for the first of 16 parts."
        )
    index, count = int(found[1]), int(found[2])
    if count < 1:
        raise ConfigError(f"--partition is '{text}'; a build has at least one part: 0/1.")
    if index >= count:
        raise ConfigError(
            f"--partition is '{text}'; the {count} parts are numbered 0 to {count - 1}. Start a "
            f"SLURM array with --array=0-{count - 1}."
        )
    return Partition(index, count)
