"""Find and read the images of a corpus: where each image lies, and its names.

``pack`` writes two Parquet files beside the tar shards; ``open_corpus`` opens them.

    index.parquet   key, shard, offset, size, width, height    a row per distinct image
    names.parquet   name, key                                  all names of the images

A key is the SHA-256 of the image's bytes in hex, and bytes that do not have it are never returned.
A corpus may have ten million rows: both tables stay on disk, and a look-up reads one column from
end to end (``parquet_table``). A stranger may have written them: ``open_corpus`` checks shards,
offsets and sizes of all rows, and a key is checked when it is first read.
"""

import hashlib
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from movekd.corpus.keys import Keys, decode_keys
from movekd.corpus.parquet_table import PART_ROWS, ParquetTable, lines, open_parquet
from movekd.errors import CorpusError, UnknownKeyError, printable, shorten

INDEX_FILE = "index.parquet"
NAMES_FILE = "names.parquet"
CONVERSATIONS_FILE = "conversations.jsonl"

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # path of the tar, relative to the index
        ("offset", pa.int64()),  # place of the image's first byte in the tar
        ("size", pa.int64()),  # in bytes
        ("width", pa.int32()),  # in pixels, after EXIF rotation
        ("height", pa.int32()),
    ]
)
NAMES_SCHEMA = pa.schema([("name", pa.string()), ("key", pa.string())])

MAX_IMAGE_BYTES = 2**30
"""Largest image file: above Pillow's limit of pixels, uncompressed in 16 bits."""
MAX_SIDE = 2**20
"""Largest width and height in pixels: more than that limit leaves to a strip of 200:1."""

_FINGERPRINT_BLOCK = 1024
_MAX_OPEN_FILES = 256
_MAX_SHARD_NAME = 1024
_MAX_OFFSET = 2**62
_MIN_ROW_BYTES = 32  # of a file with a row per distinct SHA-256, however it is encoded


class Corpus:
    """Images in tar shards, read by row number, from any thread and any worker process.

    Pickling sends the path of the folder; the other process opens it again.

    Attributes:
        data_dir: folder of the index.
        index: table of ``INDEX_SCHEMA``, a row per distinct image.
        names: table of ``NAMES_SCHEMA``.
    """

    def __init__(self, data_dir: Path, index: ParquetTable, names: ParquetTable):
        self.data_dir = data_dir
        self.index = index
        self.names = names
        self._shards, self._shard, self._offset, self._size = _read_places(index, data_dir)
        self._keys = Keys(index, str(data_dir / INDEX_FILE))
        self._files: dict[str, int] = {}  # shard -> file descriptor
        weakref.finalize(self, _close_all, self._files)

    def __len__(self) -> int:
        return len(self._offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.data_dir,)

    @property
    def shards(self) -> list[str]:
        """Tar files that hold an image, in order of first use, relative to ``data_dir``."""
        return list(self._shards)

    @property
    def conversations_path(self) -> Path | None:
        """The conversations packed with the images, or None for a corpus of images only.

        Raises:
            CorpusError: something else than a file has their name.
        """
        path = self.data_dir / CONVERSATIONS_FILE
        if path.is_file():
            return path
        if os.path.lexists(path):
            raise CorpusError(
                f"{path} is no regular file; expected the conversations of the corpus, or nothing "
                "of this name. Restore it, or pack the corpus again."
            )
        return None

    def key(self, row: int) -> str:
        """Return the key of the image in one row."""
        return self._keys.digest(row).hex()

    def describe(self, row: int) -> str:
        """Return the key of an image and its folder, for messages."""
        return f"{self.key(row)} of {self.data_dir}"

    def read_image(self, row: int) -> bytes:
        """Return the bytes of the image file in one row; they have the SHA-256 of its key.

        Raises:
            CorpusError: the shard was deleted, cut or changed since the corpus was packed. It is
                no ``UnreadableImageError``: a build skips an image that cannot be decoded, but
                bytes of another image would give wrong features.
        """
        shard = self._shards[self._shard[row]]
        offset, size = int(self._offset[row]), int(self._size[row])
        try:
            data = self._read(shard, offset, size)
        except OSError as error:
            raise CorpusError(
                f"{printable(self.data_dir / shard)} cannot be read ({error.strerror}); expected "
                f"{size} bytes of an image at {offset}. Restore the shard, or pack the corpus "
                "again."
            ) from None
        if len(data) != size:
            raise _short_shard(self.data_dir / shard, offset + len(data), offset + size)
        found = hashlib.sha256(data).digest()
        if found != self._keys.digest(row) and found != self._keys.digest(row, anew=True):
            raise CorpusError(
                f"image {self.describe(row)}: the {size:,} bytes at {offset:,} of "
                f"{printable(shard)} have SHA-256 {found.hex()[:16]}..., not that of the key; the "
                "shard is damaged or was replaced. Restore it, or pack the corpus again with "
                "--overwrite."
            )
        return data

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
        """Read every image; yield a sentence about each that is not that of its key.

        Args:
            progress: receives how many images are done, of how many.
        """
        for done, row in enumerate(np.lexsort((self._offset, self._shard)).tolist()):
            try:
                self.read_image(row)
            except CorpusError as error:
                yield str(error)
            if progress is not None:
                progress(done + 1, len(self))

    def rows(self, names_or_keys: Sequence[str] | pa.Array) -> NDArray[np.int64]:
        """Return the row of each name or key, int64, in the order asked.

        A call reads the whole index, so ask for many names at once.

        Raises:
            UnknownKeyError: names how many are unknown, and the first three.
        """
        rows = find_rows(names_or_keys, self.index, self.names)
        require_known(names_or_keys, rows, str(self.data_dir))
        return rows

    def fingerprint(self, num_rows: int | None = None) -> str:
        """Return the SHA-256, in hex, of the keys of the first ``num_rows`` rows. Default: all.

        A hash chain over blocks of 1,024 rows. Appending images does not change the fingerprint of
        the old number of rows.

        Raises:
            CorpusError: a key is no SHA-256.
        """
        num_rows = len(self) if num_rows is None else min(num_rows, len(self))

        def parts() -> Iterator[pa.ChunkedArray]:
            for first in range(0, num_rows, PART_ROWS):
                part = self.index.slice(first, min(PART_ROWS, num_rows - first), ["key"])
                decode_keys(part["key"], first, str(self.data_dir / INDEX_FILE))
                yield part["key"]

        return fingerprint_keys(parts())

    def shard_ends(self) -> NDArray[np.int64]:
        """Return the least size of each of ``shards`` in bytes."""
        ends = np.zeros(len(self._shards), np.int64)
        for start in range(0, len(self), PART_ROWS):  # a sum of all rows would be new memory
            part = slice(start, start + PART_ROWS)
            np.maximum.at(ends, self._shard[part], self._offset[part] + self._size[part])
        return ends

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes of a shard; keep it open unless too many are."""
        file = self._files.get(shard)
        if file is not None:
            return _pread(file, offset, size)
        # O_NONBLOCK: opening a FIFO without it waits for a writer
        file = os.open(self.data_dir / shard, os.O_RDONLY | os.O_NONBLOCK)
        is_kept = False
        try:
            if len(self._files) < _MAX_OPEN_FILES:
                # another thread may have opened the same shard first
                is_kept = self._files.setdefault(shard, file) == file
            return _pread(file, offset, size)
        finally:
            if not is_kept:
                os.close(file)


def open_corpus(data_dir: Path | str) -> Corpus:
    """Return the corpus in a folder that ``movekd shards pack`` has written or indexed.

    Raises:
        CorpusError: the index is missing or damaged, or a shard is missing, too short, no regular
            file, or outside of the folder.
    """
    data_dir = Path(data_dir)
    if not os.path.lexists(data_dir / INDEX_FILE):
        raise CorpusError(
            f"{data_dir} holds no {INDEX_FILE}; expected a corpus folder. "
            "Make one with `movekd shards pack`."
        )
    index, names = (
        open_table(data_dir / name, schema)
        for name, schema in ((INDEX_FILE, INDEX_SCHEMA), (NAMES_FILE, NAMES_SCHEMA))
    )
    corpus = Corpus(data_dir, index, names)
    for shard, end in zip(corpus.shards, corpus.shard_ends().tolist(), strict=True):
        path = data_dir / shard
        try:
            found = path.stat()
        except OSError as error:
            raise CorpusError(
                f"{printable(path)} is missing ({error.strerror}); {INDEX_FILE} beside it expects "
                "it. Restore the shard, or pack the corpus again with --overwrite."
            ) from None
        if not stat.S_ISREG(found.st_mode):
            raise CorpusError(
                f"{printable(path)} is no regular file; {INDEX_FILE} beside it expects a tar. "
                "Restore the shard, or pack the corpus again with --overwrite."
            )
        if found.st_size < end:
            raise _short_shard(path, found.st_size, end)
    return corpus


def fingerprint_keys(parts: Iterable[pa.ChunkedArray]) -> str:
    """Return ``Corpus.fingerprint`` of keys, of which each part but the last has ``PART_ROWS``."""
    link = hashlib.sha256(b"movekd corpus").digest()
    for part in parts:
        text, starts = lines(part)
        for start in range(0, len(part), _FINGERPRINT_BLOCK):
            end = min(start + _FINGERPRINT_BLOCK, len(part))
            block = hashlib.sha256(link)
            block.update(text[starts[start] : starts[end] - 1])  # no newline after the last
            link = block.digest()
    return link.hex()


def find_rows(
    names_or_keys: Sequence[str] | pa.Array, index: ParquetTable, names: ParquetTable
) -> NDArray[np.int64]:
    """Return the position in ``index`` of each name or key, int64; -1 for an unknown one.

    Args:
        names_or_keys: names or keys of images.
        index: table with a column ``key``.
        names: table of ``NAMES_SCHEMA``.
    """
    asked = pa.array(names_or_keys, pa.string())
    key = names.take("key", names.find("name", asked))
    return index.find("key", pc.coalesce(key, asked))


def require_known(
    names_or_keys: Sequence[str] | pa.Array, rows: NDArray[np.int64], where: str
) -> None:
    """Refuse rows of -1, which ``find_rows`` returns for unknown names.

    Raises:
        UnknownKeyError: names how many are unknown in ``where``, and the first three.
    """
    if (rows >= 0).all():
        return
    asked = pa.array(names_or_keys, pa.string())
    missing = asked.filter(pa.array(rows < 0)).unique()
    first = ", ".join(repr(name) for name in missing[:3].to_pylist())
    raise UnknownKeyError(
        f"{where} holds no image named {first}"
        f"{' ...' if len(missing) > 3 else ''} ({len(missing)} of {len(asked)} unknown); "
        f"expected names as in {NAMES_FILE} or keys as in {INDEX_FILE}. "
        "Pack the images that are missing, or correct the names."
    )


def open_table(path: Path, schema: pa.Schema) -> ParquetTable:
    """Open a Parquet file; require the columns of ``schema``. Reading a null is an error, too.

    The file's own statistics are not asked: a stranger may have written them, and pyarrow ends the
    process where they contradict the schema.

    Raises:
        CorpusError: the file is missing, damaged, or has other columns.
    """

    def damaged(reason: str) -> CorpusError:
        return CorpusError(
            f"{path} cannot be read ({reason}); expected a Parquet table with the columns "
            f"{', '.join(schema.names)}. Pack the corpus again with --overwrite."
        )

    table = open_parquet(
        path,
        damaged,
        schema.names,
        min_row_bytes=_MIN_ROW_BYTES if schema == INDEX_SCHEMA else 1,
        may_have_nulls=False,
    )
    if not table.schema.equals(schema):
        found = shorten(", ".join(f"{field.name} {field.type}" for field in table.schema))
        expected = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise CorpusError(
            f"{path} holds {found or 'no column'}; expected {expected}. "
            "Pack the corpus again with --overwrite."
        )
    return table


def _read_places(
    index: ParquetTable, data_dir: Path
) -> tuple[list[str], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Return the shards in order of first use; and per row the number of its shard, offset, size.

    Reading an image needs no more than these 20 bytes per row.

    Raises:
        CorpusError: a shard lies outside of the folder, or a number is out of range.
    """
    numbers: dict[str, int] = {}
    shard = np.empty(len(index), np.int32)
    offset, size = np.empty((2, len(index)), np.int64)
    start = 0
    for part in index.parts(["shard", "offset", "size", "width", "height"], encoded=["shard"]):
        rows = slice(start, start := start + len(part))
        encoded = part["shard"].unify_dictionaries().combine_chunks()
        known = [numbers.setdefault(name, len(numbers)) for name in _texts(encoded.dictionary)]
        shard[rows] = np.array(known, np.int32)[np.asarray(encoded.indices)]
        offset[rows], size[rows] = part["offset"], part["size"]
        for name, low, high in (
            ("offset", 0, _MAX_OFFSET),
            ("size", 1, MAX_IMAGE_BYTES),
            ("width", 1, MAX_SIDE),
            ("height", 1, MAX_SIDE),
        ):
            found = pc.min_max(part[name]).as_py()
            if not low <= found["min"] <= found["max"] <= high:
                wrong = found["min"] if found["min"] < low else found["max"]
                raise CorpusError(
                    f"{data_dir / INDEX_FILE} holds the {name} {wrong}; expected {low} to "
                    f"{high:,}. Pack the corpus again with --overwrite."
                )
    for name in numbers:
        if not _is_below(name):
            raise CorpusError(
                f"{data_dir / INDEX_FILE} names the shard '{shorten(name)}'; expected a path below "
                "its folder. Pack the corpus again with --overwrite."
            )
    return list(numbers), shard, offset, size


def _texts(array: pa.Array) -> list[str]:
    """Return strings of a file; bytes that are no UTF-8 become question marks, as no path has."""
    try:
        return [str(text) for text in array.to_pylist()]
    except UnicodeDecodeError:
        return [raw.decode("utf-8", "replace") for raw in array.cast(pa.binary()).to_pylist()]


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    is_plain = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return is_plain and path.name != "" and len(name) <= _MAX_SHARD_NAME


def _short_shard(path: Path, found: int, expected: int) -> CorpusError:
    return CorpusError(
        f"{printable(path)} ends after {found:,} bytes; {INDEX_FILE} expects at least "
        f"{expected:,}. Copy the shard again, or pack the corpus again with --overwrite."
    )


def _pread(file: int, offset: int, size: int) -> bytes:
    """Return ``size`` bytes at ``offset``, fewer at the file's end."""
    data = os.pread(file, size, offset)
    while 0 < len(data) < size:  # pread may return less: a signal, or Linux's limit of 2 GiB
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _close_all(files: dict[str, int]) -> None:
    """Close the files of a corpus that was garbage-collected."""
    while files:
        os.close(files.popitem()[1])
