"""One Zarr shard while the teacher fills it: encoded rows, what was skipped, the codec's error.

Teacher output and codec statistics come in, batch by batch; a sealed Zarr shard goes out.
``extract.pipeline`` makes one for each unit of work.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.cache import grid, layout
from movekd.cache.contents import read_calibration
from movekd.cache.schema import EncodingError
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage
from movekd.cache.writer import TeacherWriter
from movekd.errors import CacheError
from movekd.extract.image_loader import PixelBatch
from movekd.extract.locks import writing
from movekd.teachers import TeacherOutput


@dataclass(frozen=True)
class ShardTask:
    """One Zarr shard: its number, what it holds, and the checksum of the images' keys.

    Attributes:
        rows: the rows in it that stand for a view of an image, ascending.
        places: where each is in the catalog.
        keys_xxh3_128: which images they are of, see ``Catalog.keys_checksum``.
    """

    shard: int
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    keys_xxh3_128: str


class ShardBuffer:
    """The rows of one unit while the teacher fills them; NaN until then."""

    def __init__(self, store: TeacherWriter, unit: ShardTask, max_error: float | None) -> None:
        self._store, self._unit, self._max_error = store, unit, max_error
        self._first = unit.shard * store.layout.rows_per_shard
        length = int(unit.rows[-1]) - self._first + 1 if len(unit.rows) else 0
        self._arrays = {
            name: np.full((length, *array.row_shape), array.fill_value, array.dtype)
            for name, array in store.layout.arrays.items()
        }
        self._filled = 0
        self._skipped: dict[int, str] = {}
        self._error_sum, self._error_max, self._num_tokens = 0.0, 0.0, 0

    def add(self, output: TeacherOutput, batch: PixelBatch, stats: ChannelStats) -> None:
        """Encode a batch and put it into its rows."""
        rows = self._next_rows(batch)
        readable = [i for i in range(len(batch.images)) if i not in batch.unreadable]
        if batch.unreadable:
            output = _picked(output, readable)
        tokens_BND = output.tokens_BND.float()
        try:
            stored = self._store.codec.encode(tokens_BND, stats)
        except CacheError as error:
            raise CacheError(f"teacher '{self._store.teacher}': {error}") from None
        error_sum, error_max = self._store.codec.error(tokens_BND, stored, stats)
        self._error_sum += error_sum.item()
        self._error_max = max(self._error_max, error_max.item())
        if self._max_error is not None and self._error_max > self._max_error:
            raise CacheError(
                f"teacher '{self._store.teacher}', rows {self._first + rows[0]} to "
                f"{self._first + rows[-1]}: a token was stored with a relative error of "
                f"{self._error_max:.2%}; the spec allows max_error {self._max_error:.2%}. Store "
                "float16 (--codec float16), give more --calibration-images, or raise max_error."
            )
        self._num_tokens += tokens_BND.shape[0] * tokens_BND.shape[1]
        if output.cls_BD is not None:
            stored["cls"] = _half(output.cls_BD, "[CLS] embedding")
        if output.cls_attention_BHN is not None:
            stored["cls_attention"] = _half(output.cls_attention_BHN, "attention")
        for name, values in stored.items():
            self._arrays[name][rows[readable]] = values.cpu().numpy()

    def skip(self, batch: PixelBatch) -> None:
        """Leave a batch of which no image could be read."""
        self._next_rows(batch)

    def write(self, storage: Storage) -> None:
        """Write and seal the Zarr shard, unless another process has done so meanwhile.

        Raises:
            CacheError: the teacher was begun anew since, with another calibration.
        """
        store, shard = self._store, self._unit.shard
        with writing(storage, store.teacher, shard):
            if storage.exists(layout.seal_name(store.teacher, shard)):
                return  # the same bytes; sealed files are never written again
            if read_calibration(storage, store.teacher) != store.calibration:
                raise CacheError(
                    f"teacher '{store.teacher}' in {storage.url} was replaced by another build "
                    "while this one ran; run the same command again to go on with that one."
                )
            store.write_shard(
                shard,
                self._arrays,
                keys_xxh3_128=self._unit.keys_xxh3_128,
                skipped=self._skipped,
                error=EncodingError(
                    mean=self._error_sum / max(self._num_tokens, 1),
                    max=self._error_max,
                    num_tokens=self._num_tokens,
                ),
            )

    def _next_rows(self, batch: PixelBatch) -> npt.NDArray[np.int64]:
        """Return the batch's rows, counted from the shard's first, and note the unreadable."""
        end = self._filled + len(batch.images)
        rows = self._unit.rows[self._filled : end]
        self._filled = end
        for position, reason in batch.unreadable.items():
            self._skipped[int(rows[position])] = reason
        return rows - self._first


def resize_output(output: TeacherOutput, spec: CacheSpec) -> TeacherOutput:
    """Return the output resized to the grid that the spec stores."""
    if spec.grid == "native":
        return output
    attention = output.cls_attention_BHN
    return TeacherOutput(
        grid.resize_tokens(output.tokens_BND.float(), spec.grid),
        output.cls_BD,
        None if attention is None else grid.resize_attention(attention.float(), spec.grid),
    )


def _picked(output: TeacherOutput, places: list[int]) -> TeacherOutput:
    """Return some rows of a batch."""
    cls, attention = output.cls_BD, output.cls_attention_BHN
    return TeacherOutput(
        output.tokens_BND[places],
        None if cls is None else cls[places],
        None if attention is None else attention[places],
    )


def _half(values: Tensor, what: str) -> Tensor:
    half = values.half()
    if not bool(torch.isfinite(half).all()):
        raise CacheError(
            f"the {what} holds values beyond float16's 65504, or not numbers; check the weights, "
            "or use --dtype float32."
        )
    return half
