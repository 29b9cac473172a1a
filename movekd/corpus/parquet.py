"""Pack Parquet files of images and conversations: ``movekd shards pack --parquet``.

Input: files whose rows hold image bytes and turns (``parquet_source``). Output: shards, index,
names, conversations, as ``pack`` writes them from LLaVA's JSON. Each row is read once, and a few
megabytes of rows are in memory at a time, however large a file or its row groups are.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from movekd.corpus.conversations import Change, Conversation, parse_conversation
from movekd.corpus.image_source import (
    ImageSource,
    RejectedImage,
    UsableImage,
    examine_images,
    refused_path,
)
from movekd.corpus.media import unknown_media
from movekd.corpus.pack import DEFAULT_SHARD_BYTES, DEFAULT_WORKERS, Progress
from movekd.corpus.parquet_files import list_parquet
from movekd.corpus.parquet_source import DamagedRowsError, ParquetRow, ParquetSource, open_source
from movekd.corpus.report import PackReport, ProblemKind, Tally
from movekd.corpus.writer import CorpusBuilder, build_corpus
from movekd.errors import ConfigError, shorten

BATCH_BYTES = 64 * 2**20
"""Bytes of rows in memory at a time. A larger row is read by itself."""

_MAX_TEXT_CHARACTERS = 4 * 2**20
"""Longest text of a row: its line in conversations.jsonl is read back."""
_LIKE_OURS = re.compile(r":\d+:\d+$")


def pack_parquet(
    sources: Sequence[str],
    out_dir: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack the images and conversations in Parquet files.

    A row is a conversation, dropped for the same reasons as an entry of LLaVA's JSON. An image is
    called by the path that its row has for it, if that is relative and means no earlier image; else
    FILE:ROW:IMAGE, counted from 0. A row without an id is called FILE:ROW. All of it is reported.

    Args:
        sources: Parquet files, folders of them, or globs.
        out_dir: the corpus folder; created if missing.
        max_shard_bytes: largest tar; a larger image gets its own.
        num_workers: threads that decode images; the result does not depend on it.
        overwrite: replace another corpus in ``out_dir``, as far as movekd wrote it.
        force: replace files that movekd cannot prove to be its own, too.
        progress: receives how many rows are done.

    Raises:
        ConfigError: a file is missing, is no Parquet, or has no columns that are understood; raised
            before the first row is read.
        CorpusError: ``out_dir`` holds another corpus or cannot be written, or no image is usable.
    """
    found = list_parquet(sources, ours=out_dir)
    files = [open_source(path, label) for label, path in found.paths.items()]
    with build_corpus(out_dir, overwrite, max_shard_bytes, force=force) as builder:
        builder.tally.find("files", len(found.left_out))
        for label, kind, reason in found.left_out:
            builder.tally.leave_out("files", kind, label, reason)
        _count_columns(builder.tally, files)
        packer = _Packer(builder, num_workers)
        done, total = 0, sum(file.num_rows for file in files)
        for file in files:
            for num_rows in packer.pack(file):
                if progress is not None:
                    progress(done + num_rows, total)
            done += file.num_rows
        return builder.report()


def _count_columns(tally: Tally, files: Sequence[ParquetSource]) -> None:
    """Report each column once, by its name: used in a file, or unused in all."""
    used = {name for file in files for name in file.columns.used}
    unused = Counter(name for file in files for name in file.columns.unused if name not in used)
    tally.find("columns", len(used) + len(unused))
    tally.keep("columns", len(used))
    for name, number in unused.items():
        reason = f"nothing reads it; {number} of {len(files)} files have it"
        tally.leave_out("columns", "unused_columns", name, reason)


class _Packer:
    """Packs one file after another; remembers which paths are names of images."""

    def __init__(self, builder: CorpusBuilder, num_workers: int) -> None:
        self._builder, self._tally = builder, builder.tally
        self._num_workers = num_workers
        self._paths: set[str] = set()

    def pack(self, file: ParquetSource) -> Iterator[int]:
        """Pack a file; yield how many of its rows are done."""
        self._tally.find("files")
        num_done = num_placed = 0
        try:
            for rows in file.batches(BATCH_BYTES):
                num_placed += self._pack_rows(file, rows)
                num_done += len(rows)
                yield num_done
        except DamagedRowsError as error:
            reason = f"{error}; {num_done:,} of {file.num_rows:,} rows were read. Download it again"
            self._tally.leave_out("files", "damaged_files", file.label, reason)
            yield file.num_rows
        else:
            self._tally.keep("files")
        if num_placed:
            reason = (
                f"the column {file.columns.turns} has no <image>; in {num_placed:,} rows, one per "
                "image was put before the first question"
            )
            self._builder.note("added_placeholders", file.label, reason)

    def _pack_rows(self, file: ParquetSource, rows: Sequence[ParquetRow]) -> int:
        """Pack some rows; return in how many ``<image>`` was put where the column has none."""
        self._tally.find("entries", len(rows))
        self._tally.find("images", sum(len(row.images) for row in rows))
        usable: list[tuple[Conversation, ParquetRow]] = []
        num_placed = 0
        for row in rows:
            entry, is_placed = self._parse(file, row)
            num_placed += is_placed
            if entry is not None:
                usable.append((entry, row))
                continue
            for name in _identities(file, row):
                reason = "its row was dropped for its text"
                self._tally.leave_out("images", "unused_images", name, reason)
        sources = [
            ImageSource([name], file.path, data=image.data)
            for entry, row in usable
            for name, image in zip(entry.images, row.images, strict=True)
            if image.data is not None
        ]
        examined = {
            found.source.names[0]: found for found in examine_images(sources, self._num_workers)
        }
        for entry, row in usable:
            names: list[str] = []
            rejected: dict[str, RejectedImage] = {}
            for name, image in zip(entry.images, row.images, strict=True):
                found = examined.pop(name, None) or _without_bytes(file, name, image.path)
                if isinstance(found, RejectedImage):
                    rejected[name] = found
                    names.append(name)
                    self._tally.leave_out("images", found.kind, name, found.reason)
                else:
                    names.append(self._add(found, image.path))
                    self._tally.keep("images")
            self._builder.keep_or_drop(replace(entry, images=tuple(names)), rejected)
        return num_placed

    def _parse(self, file: ParquetSource, row: ParquetRow) -> tuple[Conversation | None, bool]:
        """Return a row's conversation, its images called FILE:ROW:IMAGE, or None after reporting.

        Returns also whether ``<image>`` was put where the column has none.
        """
        columns, default_id = file.columns, f"{file.label}:{row.number}"
        changes: list[tuple[Change, str]] = []
        entry: dict[str, Any] = {
            **{"id": row.id, "conversations": row.turns, "image": _identities(file, row)},
            **row.media,
        }
        kind: ProblemKind = "unknown_media" if unknown_media(entry) else "malformed_entries"
        where = f"{file.label}: row {row.number}"
        try:
            if not row.is_utf8:
                kind = "undecodable_text"
                raise ConfigError(f"{where} has text that is no UTF-8; expected UTF-8.")
            parsed = parse_conversation(entry, where, default_id=default_id, changes=changes)
            num_characters = sum(len(text) for _, text in parsed.turns)
            if num_characters > _MAX_TEXT_CHARACTERS:
                raise ConfigError(
                    f"{where} has {num_characters:,} characters; expected at most "
                    f"{_MAX_TEXT_CHARACTERS:,}."
                )
        except ConfigError as error:
            identity = default_id if row.id is None else str(row.id)
            self._tally.leave_out("entries", kind, identity, str(error))
            return None, False
        for change, reason in changes:
            if change != "numbered_entries" or columns.id is not None:
                self._builder.note(change, parsed.id, reason)
        # Each row of such a column lacks them: listed one by one, they would hide what is unusual.
        is_placed = columns.is_pairs and bool(parsed.images) and parsed.num_placeholders == 0
        if is_placed:
            parsed = parsed.with_placeholders(len(parsed.images))
        matched = self._builder.match_placeholders(parsed)
        return matched, is_placed and matched is not None

    def _add(self, image: UsableImage, path: str | None) -> str:
        """Add an image to the corpus, unless it is there; return its name."""
        identity, first = image.source.names[0], self._builder.name_of(image.key)
        if path is not None and (refused_path(path, "corpus") or _LIKE_OURS.search(path)):
            path = None
        if path and path not in self._paths:
            name = path
            self._paths.add(path)
        else:
            name = first or identity
            if path and first is None:
                reason = f"{shorten(path)} is the name of another image"
                self._builder.note("renamed_images", identity, reason)
        if name != first:
            source = replace(image.source, names=[name])
            self._builder.add_image(replace(image, source=source))
        elif path != first:
            self._builder.note("duplicate_images", identity, f"same bytes as {first}")
        return name


def _identities(file: ParquetSource, row: ParquetRow) -> list[str]:
    """Return what the images of a row are called as long as they have no name."""
    return [f"{file.label}:{row.number}:{at}" for at in range(len(row.images))]


def _without_bytes(file: ParquetSource, name: str, path: str | None) -> RejectedImage:
    """Return why an image without bytes cannot be used."""
    has = "neither bytes nor a path" if path is None else f"only the path {shorten(path)}"
    reason = f"{name} has {has}, and no path is followed; expected its bytes in the file"
    return RejectedImage(ImageSource([name], file.path), "images_without_bytes", reason)
