"""Build a corpus folder: collect images, names and conversations, then write all files at once.

Used by ``corpus.pack``, ``corpus.parquet`` and ``corpus.webdataset``. Files are made in a
hidden folder; ``corpus.publish`` moves them into place.
"""

import filecmp
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, get_args

import pyarrow as pa

from movekd.corpus.conversations import IMAGE_PLACEHOLDER, Conversation
from movekd.corpus.image_source import RejectedImage, UsableImage
from movekd.corpus.index import (
    CONVERSATIONS_FILE,
    INDEX_FILE,
    INDEX_SCHEMA,
    NAMES_FILE,
    NAMES_SCHEMA,
    open_table,
)
from movekd.corpus.parquet_table import write_parquet
from movekd.corpus.publish import REPORT_FILE, Target, staging_folder
from movekd.corpus.report import DroppedKind, PackReport, ProblemKind, Tally
from movekd.corpus.tar import ShardWriter
from movekd.corpus.turns import find_oddities, find_refusal
from movekd.errors import CorpusError, shorten

_BATCH_ROWS = 4096


class CorpusBuilder:
    """The images, conversations and problems found so far. Made by ``build_corpus``.

    Attributes:
        tally: what was found, kept and left out.
    """

    def __init__(self, target: Target, staging: Path, max_shard_bytes: int | None) -> None:
        out_dir = target.folder
        self.tally = Tally()
        self._out_dir, self._staging = out_dir, staging
        self._shards = None if max_shard_bytes is None else ShardWriter(staging, max_shard_bytes)
        self._is_guarded = target.is_guarded
        index, names = (
            open_table(out_dir / file, schema).read() if self._is_guarded else None
            for file, schema in ((INDEX_FILE, INDEX_SCHEMA), (NAMES_FILE, NAMES_SCHEMA))
        )
        self._index = _TableBuilder(INDEX_SCHEMA, index)
        self._names = _TableBuilder(NAMES_SCHEMA, names)
        self._first_name: dict[bytes, str] = {}  # digest -> name of the first file with these bytes
        self._shard_names: set[str] = set()
        self._size_bytes = 0
        self._conversations: TextIO | None = None
        self._ids: set[str] = set()
        self._num_text_only = 0

    def note(self, kind: ProblemKind, identity: str, reason: str) -> None:
        """Add a problem of what is kept to the report."""
        self.tally.note(kind, identity, reason)

    def add_image(self, image: UsableImage) -> None:
        """Add the names of an image and, if its bytes are new, its row."""
        digest, name = bytes.fromhex(image.key), image.source.names[-1]
        if digest in self._first_name:
            self.note("duplicate_images", name, f"same bytes as {self._first_name[digest]}")
        else:
            self._first_name[digest] = name
            shard, offset = self._place(image)
            size = (image.info.width, image.info.height)
            self._index.add(image.key, shard, offset, image.size_bytes, *size)
            self._shard_names.add(shard)
            self._size_bytes += image.size_bytes
        for name in image.source.names:
            self._names.add(name, image.key)

    def name_of(self, key: str) -> str | None:
        """Return the first name of an image that has been added, or None."""
        return self._first_name.get(bytes.fromhex(key))

    def _place(self, image: UsableImage) -> tuple[str, int]:
        """Return the shard of an image and its offset in it, after writing it if it is a file."""
        source = image.source
        if source.member is not None:
            return source.path.relative_to(self._out_dir).as_posix(), source.member.offset
        assert self._shards is not None
        return self._shards.add(f"{image.key}.{image.info.extension}", image.data)

    def match_placeholders(self, entry: Conversation) -> Conversation | None:
        """Return a conversation with one ``<image>`` per image, or None if it is left out.

        A missing ``<image>`` is put before the first question. Reports what it changed or refused.
        """
        if refusal := find_refusal(entry):
            self.tally.leave_out("entries", refusal[0], entry.id, refusal[1])
            return None
        missing = len(entry.images) - entry.num_placeholders
        found = (
            f"{entry.num_placeholders} {IMAGE_PLACEHOLDER} in the text, {len(entry.images)} images"
        )
        human = [number for number, (role, _) in enumerate(entry.turns) if role == "human"]
        if missing < 0:
            self.tally.leave_out("entries", "surplus_placeholders", entry.id, found)
            return None
        reason = ""
        if missing and not human:
            reason = f"{found}, and no human turn to hold the rest"
        elif human and human[0] > 0 and IMAGE_PLACEHOLDER in entry.turns[0][1]:
            reason = f"{IMAGE_PLACEHOLDER} stands in a first answer, which training leaves out"
        if reason:
            self.tally.leave_out("entries", "malformed_entries", entry.id, reason)
            return None
        if missing == 0:
            return entry
        self.note("added_placeholders", entry.id, found)
        return entry.with_placeholders(missing)

    def keep_or_drop(self, entry: Conversation, rejected: Mapping[str, RejectedImage]) -> bool:
        """Write a conversation, or report the first of its images that cannot be used.

        Returns:
            Whether it was kept.
        """
        for name in entry.images:
            if name in rejected:
                self.tally.leave_out(
                    "entries", rejected[name].kind, entry.id, rejected[name].reason
                )
                return False
        if self._conversations is None:
            path = self._staging / CONVERSATIONS_FILE
            self._conversations = path.open("w", encoding="utf-8", newline="\n")
        self._conversations.write(entry.to_json() + "\n")
        self.tally.keep("entries")
        self._num_text_only += not entry.images
        for kind, reason in find_oddities(entry):
            self.note(kind, entry.id, reason)
        if entry.id in self._ids:
            self.note("duplicate_ids", entry.id, "an earlier conversation has the same id")
        self._ids.add(entry.id)
        return True

    def report(self) -> PackReport:
        """Return the counts and problems found.

        Raises:
            AssertionError: the sums are wrong, by a fault of movekd.
        """
        entries = self.tally.sums["entries"]
        return PackReport(
            num_shards=len(self._shard_names),
            num_images=len(self._index),
            num_names=len(self._names),
            size_bytes=self._size_bytes,
            num_entries=entries["found"],
            num_kept=entries["kept"],
            num_text_only=self._num_text_only,
            **{kind: tuple(problems) for kind, problems in self.tally.problems.items()},
            sums=self.tally.checked_sums(),
        )

    def finish(self) -> None:
        """Write the tables and the report.

        Raises:
            CorpusError: no image was found, or ``out_dir`` holds another corpus.
        """
        self.close()
        if len(self._index) == 0:
            raise self._no_image()
        for file, table in ((INDEX_FILE, self._index), (NAMES_FILE, self._names)):
            rows = table.finish()
            write_parquet(self._staging / file, [rows], rows.schema)
        if self._is_guarded:
            old, new = (folder / CONVERSATIONS_FILE for folder in (self._out_dir, self._staging))
            is_equal = old.is_file() == new.is_file()
            if not is_equal or (old.is_file() and not filecmp.cmp(old, new, shallow=False)):
                raise _DifferentCorpusError
        self.report().write(self._staging / REPORT_FILE)

    def close(self) -> None:
        """Close the open files."""
        if self._shards is not None:
            self._shards.close()
        if self._conversations is not None:
            self._conversations.close()

    def _no_image(self) -> CorpusError:
        problems = [(kind, found) for kind, found in self.tally.problems.items() if found]
        problems = [each for each in problems if each[0] in get_args(DroppedKind)] or problems
        if not problems:
            return CorpusError(
                "no image was found; expected at least one. "
                "Check the folder and the paths in the JSON or Parquet files."
            )
        counts = ", ".join(f"{len(found)} {kind.replace('_', ' ')}" for kind, found in problems)
        identity, reason = map(shorten, problems[0][1][0])
        return CorpusError(
            f"no image can be used ({counts}); expected at least one. The first: {identity}: "
            f"{reason.rstrip('.')}. Check the folder and the paths in the JSON or Parquet files."
        )


@contextmanager
def build_corpus(
    out_dir: Path, overwrite: bool, max_shard_bytes: int | None = None, *, force: bool = False
) -> Iterator[CorpusBuilder]:
    """Yield a builder; move its files into place when the block ends without an error.

    Args:
        out_dir: the corpus folder; created if missing.
        overwrite: replace another corpus in it.
        max_shard_bytes: largest tar to write. Default: the shards lie in ``out_dir`` already.
        force: replace files that movekd cannot prove to be its own.

    Raises:
        CorpusError: ``out_dir`` holds another corpus or files of others, cannot be written, or
            another pack is writing to it; or no image was found.
    """
    target = Target(out_dir, max_shard_bytes is not None, overwrite, force)
    try:
        with staging_folder(target) as staging:
            builder = CorpusBuilder(target, staging, max_shard_bytes)
            try:
                yield builder
                builder.finish()
            finally:
                builder.close()
    except _DifferentCorpusError:
        raise CorpusError(
            f"{out_dir} holds another corpus than the one asked for; expected an empty folder or "
            "the same corpus. Choose another folder, or replace it with --overwrite."
        ) from None
    except OSError as error:
        raise CorpusError(
            f"{out_dir} cannot be written ({error.strerror or error}); expected a folder with "
            "free space and write permission. Correct that and run the same command again."
        ) from None


class _DifferentCorpusError(Exception):
    """The folder holds another corpus already."""


class _TableBuilder:
    """Collect rows as Arrow batches, which take a tenth of the memory of Python tuples.

    ``expected`` is None or the table that must result; the first batch that differs from it raises
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
        batch = pa.record_batch(list(zip(*self._rows, strict=True)), schema=self._schema)
        if self._expected is not None:
            expected = self._expected.slice(self._num_batched, len(batch))
            if not expected.equals(pa.Table.from_batches([batch])):
                raise _DifferentCorpusError
        self._batches.append(batch)
        self._num_batched += len(batch)
        self._rows = []
