"""PackReport: what packing a corpus kept, and what it left out or changed, with reasons.

``Tally`` counts while a pack runs. ``PackReport`` is written as ``report.json``; ``movekd shards
pack`` prints a summary. Everything found is counted once, so that for each unit::

    found = kept + every reason for which something was left out
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

Problem = tuple[str, str]
"""(id, reason). The id is that of an entry, the path of a file, or SHARD/MEMBER."""

Unit = Literal["entries", "names", "images", "files", "members", "shards", "columns"]
"""What is counted: conversations; image names in LLaVA's JSON; images in rows of Parquet; files and
folders that were not entered; members of tars; tars; columns of Parquet, by their names."""

DroppedKind = Literal[
    "missing_files",
    "unreadable_images",
    "refused_paths",
    "surplus_placeholders",
    "duplicate_samples",
    "malformed_entries",
    "damaged_shards",
    "special_files",
    "skipped_folders",
    "not_images",
    "unknown_media",
    "undecodable_text",
    "texts_without_image",
    "ambiguous_texts",
    "no_answers",
    "empty_answers",
    "images_without_bytes",
    "damaged_files",
]
UnusedKind = Literal["unused_members", "unused_files", "unused_columns", "unused_images"]
NoteKind = Literal[
    "added_placeholders",
    "duplicate_ids",
    "duplicate_images",
    "rejected_names",
    "auxiliary_images",
    "images_by_position",
    "numbered_entries",
    "system_turns",
    "leading_answers",
    "unordered_turns",
    "blank_answers",
    "replaced_characters",
    "renamed_images",
]
ProblemKind = Literal[DroppedKind, UnusedKind, NoteKind]


class Tally:
    """What a pack found, kept and left out so far.

    Attributes:
        sums: per unit: how many were found, kept, or left out for each reason.
        problems: (id, reason) of everything that was left out or changed, by kind.
    """

    def __init__(self) -> None:
        self.sums: defaultdict[Unit, Counter[str]] = defaultdict(Counter)
        self.problems: defaultdict[ProblemKind, list[Problem]] = defaultdict(list)

    def find(self, unit: Unit, number: int = 1) -> None:
        """Count what was found; each is then either kept or left out."""
        self.sums[unit]["found"] += number

    def keep(self, unit: Unit, number: int = 1) -> None:
        """Count what was kept."""
        self.sums[unit]["kept"] += number

    def leave_out(self, unit: Unit, kind: ProblemKind, identity: str, reason: str) -> None:
        """Count and list one that was found and is not in the corpus."""
        self.sums[unit][kind] += 1
        self.note(kind, identity, reason)

    def note(self, kind: ProblemKind, identity: str, reason: str) -> None:
        """List something about what was kept."""
        self.problems[kind].append((identity, reason))

    def checked_sums(self) -> dict[str, dict[str, int]]:
        """Return the sums.

        Raises:
            AssertionError: something found was neither kept nor left out, or was counted twice: a
                fault of movekd, so no report may be written.
        """
        for unit, sums in self.sums.items():
            if 2 * sums["found"] != sums.total():
                raise AssertionError(f"{unit} do not add up: {dict(sums)}")
        found: list[Unit] = [unit for unit in get_args(Unit) if self.sums[unit]["found"]]
        return {unit: dict(self.sums[unit]) for unit in found}


@dataclass(frozen=True)
class PackReport:
    """Counts, and the (id, reason) of each problem.

    Attributes:
        num_shards: tars that hold the images.
        num_images: distinct images in the index.
        num_names: names of these images.
        size_bytes: bytes of the images, without the tars' headers.
        num_entries: conversations found.
        num_kept: conversations kept.
        num_text_only: kept conversations without an image.
        missing_files: dropped: the file does not exist.
        unreadable_images: dropped: the file is no image that can be read, or is damaged.
        refused_paths: dropped: the path leads out of the folder or tar, or is not Unicode.
        surplus_placeholders: dropped: the text has more ``<image>`` than images.
        duplicate_samples: dropped: an earlier member has the same name.
        malformed_entries: dropped: an entry that is no conversation, or lacks ``<image>`` and has
            no human turn to put it in.
        damaged_shards: tars that were read in part or not at all, or hold no image.
        special_files: dropped: no regular file, say a FIFO, a device, or a link in a tar.
        skipped_folders: dropped: a link to a folder, or a folder that cannot be read.
        not_images: dropped: a file without an image's bytes or name in a folder of images; an
            image beside the tars of a WebDataset.
        unknown_media: dropped: a video, sound or PDF, or an entry about one, or an entry whose
            image is under a key that is not understood.
        undecodable_text: dropped: a caption that is not UTF-8 text.
        texts_without_image: dropped: a caption whose sample has no image.
        ambiguous_texts: dropped: several texts of one kind in a sample, none with its key.
        no_answers: dropped: no turn of the model, so nothing to learn.
        empty_answers: dropped: all answers are empty or blank.
        images_without_bytes: dropped: a row of Parquet has only the path of an image. It is not
            followed.
        damaged_files: Parquet files that were read only up to a damaged row.
        unused_members: not needed: members of tars that are neither image nor conversation.
        unused_files: not needed: files beside the tars of a WebDataset, or beside Parquet files.
        unused_columns: not needed: columns of Parquet, and fields of its conversations, that hold
            neither images nor text.
        unused_images: not needed: images of rows of Parquet whose conversations were dropped.
        added_placeholders: kept: the missing ``<image>`` was put before the first question.
            Listed by file for a column ``texts``, which has none.
        duplicate_ids: kept: an earlier conversation has the same id.
        duplicate_images: kept as another name: an earlier file has the same bytes.
        rejected_names: names in LLaVA's JSON without a usable image; their entries were dropped.
        auxiliary_images: kept: images of a sample whose conversations are about others of it.
        images_by_position: kept: the entry's image names match no member of its sample, so that
            the order of the members decided.
        numbered_entries: kept: the entry has no id and got its number in the file.
        system_turns: kept: a system turn was put before the next question.
        leading_answers: kept: the first turn is an answer. Training leaves it out as LLaVA does
            (prompt v1), unless it is the only turn.
        unordered_turns: kept: questions and answers do not alternate, or a question comes last.
            LLaVA's training stops at such an entry or ignores it.
        blank_answers: kept: some answers are empty or blank, others are not.
        replaced_characters: kept: half of a surrogate pair became a question mark.
        renamed_images: kept: the path of an image in Parquet is the name of an earlier one, so that
            it is called FILE:ROW:IMAGE.
        sums: per unit how many were found, kept, and left out for each reason.
    """

    num_shards: int
    num_images: int
    num_names: int
    size_bytes: int
    num_entries: int = 0
    num_kept: int = 0
    num_text_only: int = 0
    missing_files: tuple[Problem, ...] = ()
    unreadable_images: tuple[Problem, ...] = ()
    refused_paths: tuple[Problem, ...] = ()
    surplus_placeholders: tuple[Problem, ...] = ()
    duplicate_samples: tuple[Problem, ...] = ()
    malformed_entries: tuple[Problem, ...] = ()
    damaged_shards: tuple[Problem, ...] = ()
    special_files: tuple[Problem, ...] = ()
    skipped_folders: tuple[Problem, ...] = ()
    not_images: tuple[Problem, ...] = ()
    unknown_media: tuple[Problem, ...] = ()
    undecodable_text: tuple[Problem, ...] = ()
    texts_without_image: tuple[Problem, ...] = ()
    ambiguous_texts: tuple[Problem, ...] = ()
    no_answers: tuple[Problem, ...] = ()
    empty_answers: tuple[Problem, ...] = ()
    images_without_bytes: tuple[Problem, ...] = ()
    damaged_files: tuple[Problem, ...] = ()
    unused_members: tuple[Problem, ...] = ()
    unused_files: tuple[Problem, ...] = ()
    unused_columns: tuple[Problem, ...] = ()
    unused_images: tuple[Problem, ...] = ()
    added_placeholders: tuple[Problem, ...] = ()
    duplicate_ids: tuple[Problem, ...] = ()
    duplicate_images: tuple[Problem, ...] = ()
    rejected_names: tuple[Problem, ...] = ()
    auxiliary_images: tuple[Problem, ...] = ()
    images_by_position: tuple[Problem, ...] = ()
    numbered_entries: tuple[Problem, ...] = ()
    system_turns: tuple[Problem, ...] = ()
    leading_answers: tuple[Problem, ...] = ()
    unordered_turns: tuple[Problem, ...] = ()
    blank_answers: tuple[Problem, ...] = ()
    replaced_characters: tuple[Problem, ...] = ()
    renamed_images: tuple[Problem, ...] = ()
    sums: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def problems(self) -> dict[str, tuple[Problem, ...]]:
        """The lists that are not empty."""
        return {
            kind: found
            for kind, found in self._content().items()
            if isinstance(found, tuple) and found
        }

    @property
    def counts(self) -> dict[str, Any]:
        """Every field: a number or the sums as they are, a list as its length."""
        return {
            key: len(value) if isinstance(value, tuple) else value
            for key, value in self._content().items()
        }

    @property
    def num_dropped(self) -> int:
        """How many entries, images, files, members or shards were dropped."""
        return sum(len(getattr(self, kind)) for kind in get_args(DroppedKind))

    def write(self, path: Path) -> None:
        """Write the report as JSON: the same report gives the same bytes."""
        # A name that is not Unicode holds lone surrogates, which become JSON's escapes.
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            json.dump(self._content(), file, indent=1, ensure_ascii=False)
            file.write("\n")

    def _content(self) -> dict[str, Any]:
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        sums = content.pop("sums")
        found = {f"num_{unit}_found": counts["found"] for unit, counts in sums.items()}
        return content | found | {"sums": sums}
