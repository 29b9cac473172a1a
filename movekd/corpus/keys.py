"""The keys of a corpus: the SHA-256 of each image, which its bytes are held against.

Input: the ``key`` column of an index, 64 hexadecimal digits each. Output: 32 bytes per row, decoded
when a row of their row group is asked for. ``corpus.index`` uses it.
"""

import mmap

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from movekd.corpus.parquet_table import ParquetTable
from movekd.errors import CorpusError, shorten

_DIGEST_BYTES = 32
_INVALID = 255
_DIGITS = np.full(256, _INVALID, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


class Keys:
    """The SHA-256 of each image. Thread-safe.

    Ten million keys are 320 MB. They lie in memory that forked processes share, so that the workers
    of a DataLoader decode and hold them once.

    Args:
        index: a table with a column ``key``.
        where: name of the file, for errors.
    """

    def __init__(self, index: ParquetTable, where: str) -> None:
        self._index, self._where = index, where
        memory = mmap.mmap(-1, max(len(index) * (_DIGEST_BYTES + 1), 1))
        values = np.frombuffer(memory, np.uint8)[: len(index) * (_DIGEST_BYTES + 1)]
        self._digests = values[: len(index) * _DIGEST_BYTES].reshape(-1, _DIGEST_BYTES)
        self._is_known = values[len(index) * _DIGEST_BYTES :]

    def digest(self, row: int, *, anew: bool = False) -> bytes:
        """Return the SHA-256 of the image in a row.

        Args:
            row: the row.
            anew: decode it again. Another process may have marked a row as known before its value
                is visible here, so a difference counts only after that.

        Raises:
            CorpusError: a key of the same row group is no SHA-256.
        """
        if anew or not self._is_known[row]:
            start, end = self._index.group_around(row)
            column = self._index.slice(start, end - start, ["key"])["key"]
            self._digests[start:end] = decode_keys(column, start, self._where)
            self._is_known[start:end] = 1
        return bytes(self._digests[row])


def decode_keys(column: pa.ChunkedArray, first: int, where: str) -> NDArray[np.uint8]:
    """Return keys as bytes, uint8 (N, 32).

    Args:
        column: the keys, 64 digits of ``0123456789abcdef`` each.
        first: the row of the first key, for errors.
        where: name of the file, for errors.

    Raises:
        CorpusError: a key has another form.
    """
    parts = [np.empty((0, _DIGEST_BYTES), np.uint8)]
    for chunk in column.chunks:
        _, offsets, content = chunk.buffers()
        starts = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        is_wrong = np.diff(starts) != 2 * _DIGEST_BYTES
        if not is_wrong.any():
            text = np.frombuffer(content if content is not None else b"", np.uint8)
            digits = _DIGITS[text[starts[0] : starts[-1]]].reshape(-1, 2 * _DIGEST_BYTES)
            if not (digits == _INVALID).any():
                parts.append(digits[:, ::2] * np.uint8(16) + digits[:, 1::2])
                first += len(chunk)
                continue
            is_wrong = (digits == _INVALID).any(axis=1)
        place = int(np.flatnonzero(is_wrong)[0])
        found = chunk[place].cast(pa.binary()).as_py().decode("utf-8", "replace")
        raise CorpusError(
            f"{where} holds the key '{shorten(found)}' in row {first + place}; expected a SHA-256 "
            "in 64 digits of 0123456789abcdef. Pack the corpus again with --overwrite."
        )
    return np.concatenate(parts)
