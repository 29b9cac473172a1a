"""The content of each JSON file of a cache, as typed records.

``seal`` reads and writes them. It refuses a file with other keys, types or ranges than its record,
even if the checksum is right: anybody can compute one. The upper bounds are far above what a
teacher can have; they keep a stranger's numbers from asking for memory or time without end.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

import xxhash
from pydantic import ConfigDict, Field, model_validator

from movekd.cache.codecs import ArrayLayout
from movekd.cache.layout import TeacherLayout, teacher_layout
from movekd.cache.spec import CacheSpec
from movekd.config import FrozenModel
from movekd.corpus.anyres import Views
from movekd.corpus.transforms import Geometry
from movekd.files.ownership import FileEntry

MAX_ROW_VALUES = 2**28
"""Most values of the tokens of one row. The largest teachers have 2**23."""

Count = Annotated[int, Field(ge=0, le=2**40)]
Extent = Annotated[int, Field(gt=0, le=2**16)]
"""Tokens of a row, channels of a token, or heads."""
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
RowText = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,12})$")]
Reason = Annotated[str, Field(max_length=65_536)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]


class Record(FrozenModel):
    """Base of the records. Numbers are numbers: no text, no truth values."""

    model_config = ConfigDict(strict=True)

    remedy: ClassVar[str]
    """What to do if a file of this kind is damaged."""


class CacheRecord(Record):
    """cache.json: which images the rows of a cache hold."""

    remedy = "Restore it from a copy, or build into another --cache."

    format_version: int
    geometry: Geometry
    views: Views
    corpus_fingerprint: Sha256
    num_images: Count
    blocks: Annotated[list[Pair], Field(min_length=1)]
    """First row and number of images of each group of appended images."""
    files: dict[str, FileEntry]


class Calibration(Record):
    """calibration.json: settled once, for every worker, resume and appended image."""

    remedy = "Restore it from a copy, or --overwrite the teacher."

    spec_fingerprint: Sha256
    weights_sha256: Sha256
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")]
    """dtype of the teacher's forward passes."""
    is_compiled: bool
    """Whether ``torch.compile`` fused the teacher."""
    batch_size: Annotated[int, Field(gt=0, le=2**24)]
    num_images: Count
    num_tokens: Extent
    width: Extent
    cls_width: Extent | None
    num_heads: Extent | None
    channel_stats_xxh3_128: Checksum
    """Checksum of the mean and then the standard deviation, float32 little-endian."""
    codec: Annotated[str, Field(pattern="^lowrank[1-9][0-9]{0,3}$")] | None = None
    """What the calibration chose for ``codec: lowrank``. Without such a choice, no file has it."""

    @model_validator(mode="after")
    def _row_is_bounded(self) -> Self:
        for channels in (self.width, self.num_heads or 0):
            if self.num_tokens * channels > MAX_ROW_VALUES:
                raise ValueError(
                    f"a row of {self.num_tokens} x {channels} values is larger than any teacher's; "
                    f"expected at most {MAX_ROW_VALUES:,}"
                )
        return self

    def codec_of(self, spec: CacheSpec) -> str:
        """Return the name of the codec that stores the tokens: the spec's, or the chosen one."""
        return self.codec or spec.codec

    def layout(self, spec: CacheSpec) -> TeacherLayout:
        """Return the arrays of this teacher."""
        return teacher_layout(
            self.codec_of(spec),
            self.num_tokens,
            self.width,
            cls_width=self.cls_width,
            num_heads=self.num_heads,
        )

    @property
    def hash(self) -> str:
        """Checksum over all fields of the file; each seal of a Zarr shard names it."""
        content = self.model_dump(exclude_defaults=True)
        return xxhash.xxh3_128(repr(sorted(content.items())).encode()).hexdigest()


class GroupRecord(Record):
    """metadata.json: the small files of a teacher's group, and the number of rows they say."""

    remedy = "Restore it from a copy, or --overwrite the teacher."

    num_rows: Count
    files: dict[str, FileEntry]


Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class EncodingError(FrozenModel):
    """``||decoded - exact|| / ||exact||`` of each token, in standardised channels.

    ``limited_*``: the same of values limited to 8 sigma. ``energy``: the sum of
    ``||decoded - exact||**2`` over the sum of ``||exact||**2``. Earlier seals have none of these.

    ``recoded_*``: the same against the decoded tokens of another cache, where these were encoded
    again. Only then they are there, and all others are upper bounds.
    """

    model_config = ConfigDict(strict=True)

    mean: Finite
    max: Finite
    num_tokens: Count
    limited_mean: Finite | None = None
    limited_max: Finite | None = None
    energy: Finite | None = None
    recoded_mean: Finite | None = None
    recoded_max: Finite | None = None
    recoded_energy: Finite | None = None


class ShardSeal(Record):
    """NNNNN.json: one Zarr shard of every array is finished."""

    remedy = "Delete it and run `movekd cache build` again: its Zarr shard is built anew."

    rows: Pair
    """First row, and last row plus one."""
    keys_xxh3_128: Checksum
    """Checksum of the keys of these rows, see ``Catalog.keys_checksums``."""
    files: dict[str, FileEntry]
    skipped: dict[RowText, Reason]
    """Row without features -> why."""
    error: EncodingError
    calibration: Checksum
    """``Calibration.hash`` of the calibration that encoded it."""

    @model_validator(mode="after")
    def _skipped_rows_are_covered(self) -> Self:
        first, end = self.rows
        if outside := [row for row in self.skipped if not first <= int(row) < end]:
            raise ValueError(f"skipped row {outside[0]} is not one of the rows {first}..{end - 1}")
        return self


class SkippedSeal(Record):
    """skipped.json: checksum of skipped.parquet."""

    remedy = "Run its `movekd cache build` again."

    files: dict[str, FileEntry]


class Written(FrozenModel):
    """Base of what other libraries write beside movekd's keys: other keys are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")


class GroupAttributes(Written):
    """The attribute ``movekd`` in zarr.json of a teacher's group. ``spec`` is a ``CacheSpec``."""

    format_version: int
    spec: dict[str, Any]


class _Attributes(Written):
    movekd: GroupAttributes


class GroupMetadata(Written):
    """zarr.json of a teacher's group."""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: _Attributes


class _Grid(Written):
    chunk_shape: list[Count]


class _ChunkGrid(Written):
    name: Literal["regular"]
    configuration: _Grid


class _CodecSettings(Written):
    endian: Literal["little"] = "little"


class _Codec(Written):
    name: Literal["bytes", "zstd", "blosc", "crc32c"]
    configuration: _CodecSettings = _CodecSettings()


class _Sharding(Written):
    chunk_shape: list[Count]
    codecs: list[_Codec]
    index_codecs: list[_Codec]
    index_location: Literal["end"] = "end"


class _ShardingCodec(Written):
    name: Literal["sharding_indexed"]
    configuration: _Sharding


class ArrayMetadata(Written):
    """zarr.json of an array with rows: what ``tensorstore_rows`` and zarr read it by."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Annotated[list[Count], Field(min_length=1)]
    data_type: str
    chunk_grid: _ChunkGrid
    codecs: Annotated[list[_ShardingCodec], Field(min_length=1, max_length=1)]

    def fits(self, array: ArrayLayout, rows_per_shard: int) -> bool:
        """Return whether an array of this layout is described, of any number of rows."""
        sharding, row = self.codecs[0].configuration, list(array.row_shape)
        return (
            self.data_type == array.dtype
            and self.shape[1:] == row
            and self.chunk_grid.configuration.chunk_shape == [rows_per_shard, *row]
            and sharding.chunk_shape == [1, *row]
            and [codec.name for codec in sharding.codecs][:1] == ["bytes"]
            and [codec.name for codec in sharding.index_codecs] == ["bytes", "crc32c"]
        )
