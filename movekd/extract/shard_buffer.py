"""Collect the encoded rows of one Zarr shard, then write and seal it.

Input: teacher output, batch by batch, and channel statistics. Output: a sealed Zarr shard.
``extract.teacher_loop`` makes one buffer per task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.cache import layout
from movekd.cache.catalog import Catalog
from movekd.cache.contents import read_calibration
from movekd.cache.schema import EncodingError
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage
from movekd.cache.verify import shard_problems
from movekd.cache.writer import TeacherWriter
from movekd.errors import CacheError
from movekd.extract.encoding_error import ErrorSums, with_recoding
from movekd.extract.locks import sealing
from movekd.extract.options import print_error
from movekd.teachers import TeacherOutput

FEW_IMAGES = 32
"""A Zarr shard that is not full and holds fewer is not held against ``max_energy_error``."""
OutputT = TypeVar("OutputT", bound=TeacherOutput)


class RowBatch(Protocol):
    """What the buffer needs to know of a batch: a ``PixelBatch``, or rows of another cache."""

    @property
    def images(self) -> Sequence[int]:
        """Position of each image, one per row."""

    @property
    def unreadable(self) -> Mapping[int, str]:
        """Position in the batch -> why the row has no features."""


@dataclass(frozen=True)
class ShardTask:
    """One Zarr shard to build.

    Attributes:
        shard: number of the Zarr shard.
        rows: its rows that stand for a view of an image, ascending.
        row_ids: position of each in the catalog.
        keys_xxh3_128: checksum of the images' keys, see ``Catalog.keys_checksums``.
    """

    shard: int
    rows: npt.NDArray[np.int64]
    row_ids: npt.NDArray[np.int64]
    keys_xxh3_128: str


def shard_tasks(catalog: Catalog, store: TeacherWriter, shards: Sequence[int]) -> list[ShardTask]:
    """Return the tasks of some Zarr shards; a Zarr shard wholly in a gap has no rows."""
    rows, size = catalog.rows, store.layout.rows_per_shard
    spans = [(shard * size, (shard + 1) * size) for shard in shards]
    tasks = []
    for shard, span, keys in zip(shards, spans, catalog.keys_checksums(spans), strict=True):
        low, high = np.searchsorted(rows, span)
        tasks.append(ShardTask(shard, rows[low:high], np.arange(low, high), keys))
    return tasks


class ShardBuffer:
    """The rows of one Zarr shard in memory; NaN until ``add`` fills them.

    Args:
        store: the teacher in the cache.
        task: the Zarr shard.
        catalog: of the cache.
        limits: spec with the limits of errors.
        source: error of the features that ``add`` gets, if they are not the teacher's own output
            but decoded from another cache.
    """

    def __init__(
        self,
        store: TeacherWriter,
        task: ShardTask,
        catalog: Catalog,
        limits: CacheSpec,
        source: EncodingError | None = None,
    ) -> None:
        self._store, self._task, self._catalog = store, task, catalog
        self._max_error, self._max_energy = limits.max_error, limits.max_energy_error
        self._first = task.shard * store.layout.rows_per_shard
        length = int(task.rows[-1]) - self._first + 1 if len(task.rows) else 0
        self._arrays = {
            name: np.full((length, *array.row_shape), array.fill_value, array.dtype)
            for name, array in store.layout.arrays.items()
        }
        self._filled = 0
        self._skipped: dict[int, str] = {}
        self._errors, self._source = ErrorSums(), source

    def add(self, output: TeacherOutput, batch: RowBatch, stats: ChannelStats) -> None:
        """Encode a batch into its rows."""
        rows = self._next_rows(batch)
        readable = [i for i in range(len(batch.images)) if i not in batch.unreadable]
        if batch.unreadable:
            output = output.map(lambda tensor: tensor[readable])
        tokens_BND = output.tokens_BND.float()
        try:
            stored = self._store.codec.encode(tokens_BND, stats)
        except CacheError as error:
            raise CacheError(f"teacher '{self._store.teacher}': {error}") from None
        errors = self._store.codec.error(tokens_BND, stored, stats)
        self._errors.add(errors, tokens_BND.shape[0] * tokens_BND.shape[1])
        error_max = self._error().max
        if self._max_error is not None and error_max > self._max_error:
            raise CacheError(
                f"teacher '{self._store.teacher}', rows {self._first + rows[0]} to "
                f"{self._first + rows[-1]}: the codec stores a token with a relative error of "
                f"{error_max:.2%}; the spec allows max_error {self._max_error:.2%}. "
                f"{self._remedy('Store float16 (--codec float16)')} max_error."
            )
        if output.cls_BD is not None:
            stored["cls"] = _half(output.cls_BD, "[CLS] embedding")
        if output.cls_attention_BHN is not None:
            stored["cls_attention"] = _half(output.cls_attention_BHN, "attention")
        for name, values in stored.items():
            self._arrays[name][rows[readable]] = values.cpu().numpy()

    def skip(self, batch: RowBatch) -> None:
        """Leave out a batch without a readable image."""
        self._next_rows(batch)

    def write(self, storage: Storage) -> None:
        """Write and seal the Zarr shard, unless another process has sealed it meanwhile.

        A seal that its files contradict goes only now, when all of them can be written again.

        Raises:
            CacheError: another build has replaced the teacher meanwhile.
        """
        store, shard = self._store, self._task.shard
        error = self._error()
        self._check_energy(error.energy)
        seal = layout.seal_name(store.teacher, shard)
        with sealing(storage, seal):
            is_sealed = storage.exists(seal)
            if is_sealed and not any(shard_problems(store, self._catalog, [shard])):
                return  # whole files are never written again, and hold the same bytes
            if read_calibration(storage, store.teacher) != store.calibration:
                raise CacheError(
                    f"teacher '{store.teacher}' in {storage.url} was replaced by another build "
                    "while this one ran; run the same command again to continue that one."
                )
            if is_sealed:
                storage.delete(seal)
            store.write_shard(
                shard,
                self._arrays,
                keys_xxh3_128=self._task.keys_xxh3_128,
                skipped=self._skipped,
                error=error,
            )

    def _check_energy(self, energy: float | None) -> None:
        """Hold the energy error against its limit.

        The rest of a corpus, in a last Zarr shard that is not full, may be a few images that are
        unlike the others: their error is said, and sealed, and does not stop the build.
        """
        limit, num_images = self._max_energy, len(self._task.rows)
        if limit is None or energy is None or energy <= limit:
            return
        what = (
            f"teacher '{self._store.teacher}', Zarr shard {self._task.shard}: the codec stores its "
            f"tokens with an energy error of {energy:.3%}; the spec allows max_energy_error "
            f"{limit:.3%}."
        )
        if num_images < min(FEW_IMAGES, self._store.layout.rows_per_shard):
            print_error(f"{what} It holds few images ({num_images}), so this stops nothing.")
            return
        raise CacheError(f"{what} {self._remedy('Take a codec of more bytes')} max_energy_error.")

    def _remedy(self, other_codec: str) -> str:
        if self._source is None:
            return f"{other_codec}, give more --calibration-images, or raise"
        return "The error of the source is part of it. Name a codec of more bytes, or raise"

    def _error(self) -> EncodingError:
        """Return the error so far of the stored tokens against the teacher's."""
        measured = self._errors.result()
        return measured if self._source is None else with_recoding(self._source, measured)

    def _next_rows(self, batch: RowBatch) -> npt.NDArray[np.int64]:
        """Return the batch's rows, relative to the Zarr shard, and note the unreadable images."""
        end = self._filled + len(batch.images)
        rows = self._task.rows[self._filled : end]
        self._filled = end
        for position, reason in batch.unreadable.items():
            self._skipped[int(rows[position])] = reason
        return rows - self._first


def stored_output(output: OutputT, spec: CacheSpec) -> OutputT:
    """Return what the spec stores of an output: on its grid, and of the attention its heads.

    The mean over heads is taken in float32, before float16 rounds it.
    """
    output = mean_attention(output, spec)
    return output if spec.grid == "native" else output.resize(spec.grid)


def mean_attention(output: OutputT, spec: CacheSpec) -> OutputT:
    """Return the output with a head axis of length 1 if the spec stores the mean over heads."""
    attention_BHN = output.cls_attention_BHN
    if attention_BHN is None or spec.stored_heads == "all":
        return output
    return replace(output, cls_attention_BHN=attention_BHN.float().mean(dim=1, keepdim=True))


def _half(values: Tensor, name: str) -> Tensor:
    half = values.half()
    if not bool(torch.isfinite(half).all()):
        raise CacheError(
            f"the {name} holds NaN or values beyond float16's 65504; check the weights, or use "
            "--dtype float32."
        )
    return half
