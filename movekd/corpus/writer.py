"""A corpus folder in the making: rows, names and conversations in, a whole folder out.

Used by ``corpus.pack`` alone. Everything is made in a hidden folder beside its place and moved
at the end, the index last, so that a folder with an index is whole.
"""

import filecmp
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from movekd.corpus.conversations import Conversation
from movekd.corpus.index import (
    CONVERSATIONS_FILE,
    INDEX_FILE,
    INDEX_SCHEMA,
    NAMES_FILE,
    NAMES_SCHEMA,
    read_tables,
    write_table,
)
from movekd.corpus.report import PackReport, Problem, ProblemKind
from movekd.errors import CorpusError

STAGING_DIR = ".packing"

_BATCH_ROWS = 4096


class CorpusBuilder:
    """What a pack has found so far; ``building`` makes one and puts its files in place.

    Attributes:
        staging: hidden folder that the files are made in.
        num_entries: conversations found, kept or not.
    """

    def __init__(self, out_dir: Path, staging: Path, overwrite: bool):
        self.staging = staging
        self.num_entries = 0
        self._out_dir = out_dir
        self._is_guarded = (out_dir / INDEX_FILE).is_file() and not overwrite
        index, names = read_tables(out_dir) if self._is_guarded else (None, None)
        self._index = _TableBuilder(INDEX_SCHEMA, index)
        self._names = _TableBuilder(NAMES_SCHEMA, names)
        self._first_name: dict[bytes, str] = {}  # digest -> the first file of these bytes
        self._shards: set[str] = set()
        self._size_bytes = 0
        self._conversations: TextIO | None = None
        self._ids: set[str] = set()
        self._num_text_only = 0
        self._num_kept = 0
        self._problems: defaultdict[ProblemKind, list[Problem]] = defaultdict(list)

    def note(self, kind: ProblemKind, identity: str, reason: str) -> None:
        """Put a problem into the report."""
        self._problems[kind].append((identity, reason))

    def add_image(
        self,
        key: str,
        names: list[str],
        image_size: tuple[int, int],
        size_bytes: int,
        place: Callable[[], tuple[str, int]],
    ) -> None:
        """Add an image's names and, for bytes not met before, its row.

        Args:
            key: SHA-256 of its bytes in hex.
            names: what it is called; the last one identifies it in the report.
            image_size: width and height as shown.
            size_bytes: of the file.
            place: called for a new image; returns its shard and its offset in it.
        """
        digest = bytes.fromhex(key)
        if digest not in self._first_name:
            self._first_name[digest] = names[-1]
            shard, offset = place()
            self._index.add(key, shard, offset, size_bytes, *image_size)
            self._shards.add(shard)
            self._size_bytes += size_bytes
        else:
            self.note("duplicate_images", names[-1], f"same bytes as {self._first_name[digest]}")
        for name in names:
            self._names.add(name, key)

    def add_conversation(self, entry: Conversation) -> None:
        """Append a conversation whose images are all in the corpus."""
        if self._conversations is None:
            path = self.staging / CONVERSATIONS_FILE
            self._conversations = path.open("w", encoding="utf-8", newline="\n")
        self._conversations.write(entry.to_json() + "\n")
        self._num_kept += 1
        self._num_text_only += not entry.images
        if entry.id in self._ids:
            self.note("duplicate_ids", entry.id, "an earlier conversation has the same id")
        self._ids.add(entry.id)

    def report(self) -> PackReport:
        """Return what was found."""
        return PackReport(
            num_shards=len(self._shards),
            num_images=len(self._index),
            num_names=len(self._names),
            size_bytes=self._size_bytes,
            num_entries=self.num_entries,
            num_kept=self._num_kept,
            num_text_only=self._num_text_only,
            **{kind: tuple(problems) for kind, problems in self._problems.items()},
        )

    def finish(self) -> None:
        """Write the tables.

        Raises:
            CorpusError: no image was found, or ``out_dir`` holds another corpus.
        """
        self.close()
        if len(self._index) == 0:
            raise self._no_image()
        for file, table in ((INDEX_FILE, self._index), (NAMES_FILE, self._names)):
            write_table(self.staging / file, table.finish())
        if self._is_guarded:
            old, new = (folder / CONVERSATIONS_FILE for folder in (self._out_dir, self.staging))
            is_equal = old.is_file() == new.is_file()
            if not is_equal or (old.is_file() and not filecmp.cmp(old, new, shallow=False)):
                raise _DifferentCorpusError

    def close(self) -> None:
        """Close the conversations."""
        if self._conversations is not None:
            self._conversations.close()

    def _no_image(self) -> CorpusError:
        problems = [(kind, found) for kind, found in self._problems.items() if found]
        if not problems:
            return CorpusError(
                "no image was found; expected at least one. "
                "Check the folder and the paths in the JSON file."
            )
        counts = ", ".join(f"{len(found)} {kind.replace('_', ' ')}" for kind, found in problems)
        identity, reason = problems[0][1][0]
        return CorpusError(
            f"no image can be used ({counts}); expected at least one. The first: {identity}: "
            f"{reason}. Check the folder and the paths in the JSON file."
        )


@contextmanager
def building(out_dir: Path, overwrite: bool, writes_shards: bool) -> Iterator[CorpusBuilder]:
    """Give a builder, and put its files in place when the block ends without an error.

    Args:
        out_dir: the corpus folder, made if need be.
        overwrite: replace another corpus in it.
        writes_shards: whether the shards are made too, or lie in ``out_dir`` already.

    Raises:
        CorpusError: ``out_dir`` holds another corpus or cannot be written, or there is no image.
    """
    staging = out_dir / STAGING_DIR
    try:
        if writes_shards and not overwrite:
            _refuse_foreign_tars(out_dir)
        if staging.exists():  # left by an interrupted pack
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        try:
            builder = CorpusBuilder(out_dir, staging, overwrite)
            try:
                yield builder
                builder.finish()
            finally:
                builder.close()
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _publish(staging, out_dir, writes_shards)
        shutil.rmtree(staging)
    except _DifferentCorpusError:
        raise CorpusError(
            f"{out_dir} holds another corpus than the one asked for; expected an empty folder or "
            "the same corpus. Choose another folder, or replace it with --overwrite."
        ) from None
    except OSError as error:
        raise CorpusError(
            f"{out_dir} cannot be written ({error.strerror or error}); expected a folder with "
            "free space and the right to write. Mend that and run the same command again."
        ) from None


def _refuse_foreign_tars(out_dir: Path) -> None:
    """Raise for tars that no pack has written: an interrupted one leaves its hidden folder."""
    is_ours = (out_dir / INDEX_FILE).exists() or (out_dir / STAGING_DIR).exists()
    if not is_ours and any(out_dir.glob("*.tar")):
        raise CorpusError(
            f"{out_dir} holds tars but no {INDEX_FILE}; expected an empty folder or a corpus. "
            "Index them where they are with --webdataset, or choose another folder."
        )


def _publish(staging: Path, out_dir: Path, writes_shards: bool) -> None:
    """Move what was made into place: no index lies there until everything else does."""
    (out_dir / INDEX_FILE).unlink(missing_ok=True)
    if writes_shards:
        for old in out_dir.glob("shard-[0-9]*.tar"):
            old.unlink()
        for shard in sorted(staging.glob("shard-*.tar")):
            shard.replace(out_dir / shard.name)
    for file in (NAMES_FILE, CONVERSATIONS_FILE, INDEX_FILE):
        if (staging / file).is_file():
            (staging / file).replace(out_dir / file)
        else:
            (out_dir / file).unlink(missing_ok=True)


class _DifferentCorpusError(Exception):
    """What is packed differs from what lies there already."""


class _TableBuilder:
    """Collects rows as Arrow batches, a tenth of the size of Python's rows.

    ``expected`` is the table that must come out, or None; the first batch that differs raises
    ``_DifferentCorpusError``.
    """

    def __init__(self, schema: pa.Schema, expected: pa.Table | None):
        self._schema = schema
        self._expected = expected
        self._batches: list[Any] = []
        self._rows: list[tuple[Any, ...]] = []
        self._num_batched = 0

    def __len__(self) -> int:
        return self._num_batched + len(self._rows)

    def add(self, *row: Any) -> None:
        """Append one row, in the order of the schema's columns."""
        self._rows.append(row)
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def finish(self) -> pa.Table:
        """Return all rows."""
        self._flush()
        if self._expected is not None and len(self) != len(self._expected):
            raise _DifferentCorpusError
        return pa.Table.from_batches(self._batches, self._schema).combine_chunks()

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        batch = pa.record_batch(
            [
                pa.array(column, field.type)
                for column, field in zip(columns, self._schema, strict=True)
            ],
            schema=self._schema,
        )
        if self._expected is not None:
            expected = self._expected.slice(self._num_batched, len(batch))
            if not expected.equals(pa.Table.from_batches([batch])):
                raise _DifferentCorpusError
        self._batches.append(batch)
        self._num_batched += len(batch)
        self._rows = []
