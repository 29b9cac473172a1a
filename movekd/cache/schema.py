"""The content of each sealed JSON file of a cache, as typed records.

``seal`` reads and writes them. It refuses a file with other keys or types than its record, even if
the checksum is right.
"""

from typing import Annotated, ClassVar

import xxhash
from pydantic import Field

from movekd.cache.layout import TeacherLayout, teacher_layout
from movekd.cache.spec import CacheSpec
from movekd.config import FrozenModel
from movekd.corpus.anyres import Views
from movekd.corpus.transforms import Geometry
from movekd.files.ownership import FileEntry

Count = Annotated[int, Field(ge=0)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]


class Record(FrozenModel):
    """Base of the records."""

    remedy: ClassVar[str]
    """What to do if a file of this kind is damaged."""


class CacheRecord(Record):
    """cache.json: which images the rows of a cache hold."""

    remedy = "Restore it from a copy, or build into another --cache."

    format_version: int
    geometry: Geometry
    views: Views
    corpus_fingerprint: str
    num_images: Count
    blocks: list[Pair]
    """First row and number of images of each group of appended images."""
    files: dict[str, FileEntry]


class Calibration(Record):
    """calibration.json: settled once, for every worker, resume and appended image."""

    remedy = "Restore it from a copy, or --overwrite the teacher."

    spec_fingerprint: str
    weights_sha256: str
    dtype: str
    """dtype of the teacher's forward passes: ``float32``, ``bfloat16`` or ``float16``."""
    is_compiled: bool
    """Whether ``torch.compile`` fused the teacher."""
    batch_size: Annotated[int, Field(gt=0)]
    num_images: Count
    num_tokens: Count
    width: Count
    cls_width: Count | None
    num_heads: Count | None
    channel_stats_xxh3_128: str
    """Checksum of the mean and then the standard deviation, float32 little-endian."""

    def layout(self, spec: CacheSpec) -> TeacherLayout:
        """Return the arrays of this teacher."""
        return teacher_layout(
            spec.codec,
            self.num_tokens,
            self.width,
            cls_width=self.cls_width,
            num_heads=self.num_heads,
        )

    @property
    def hash(self) -> str:
        """Checksum over all fields; each seal of a Zarr shard names it."""
        return xxhash.xxh3_128(repr(sorted(self.model_dump().items())).encode()).hexdigest()


class GroupRecord(Record):
    """metadata.json: the small files of a teacher's group, and the number of rows they say."""

    remedy = "Restore it from a copy, or --overwrite the teacher."

    num_rows: Count
    files: dict[str, FileEntry]


class EncodingError(FrozenModel):
    """``||decoded - exact|| / ||exact||`` of each token, in standardised channels."""

    mean: float
    max: float
    num_tokens: Count


class ShardSeal(Record):
    """NNNNN.json: one Zarr shard of every array is finished."""

    remedy = "Delete it and run `movekd cache build` again: its Zarr shard is built anew."

    rows: Pair
    """First row, and last row plus one."""
    keys_xxh3_128: str
    """Checksum of the keys of these rows, see ``Catalog.keys_checksums``."""
    files: dict[str, FileEntry]
    skipped: dict[str, str]
    """Row without features -> why."""
    error: EncodingError
    calibration: str
    """``Calibration.hash`` of the calibration that encoded it."""


class SkippedSeal(Record):
    """skipped.json: checksum of skipped.parquet."""

    remedy = "Run its `movekd cache build` again."

    files: dict[str, FileEntry]
