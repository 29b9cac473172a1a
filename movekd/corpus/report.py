"""PackReport: what packing a corpus kept, and what it dropped or changed, with reasons.

Written as ``report.json``; ``movekd shards pack`` prints a summary.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

Problem = tuple[str, str]
"""(id, reason). The id is that of a LLaVA entry, the path of an image, or a member of a tar."""

DroppedKind = Literal[
    "missing_files",
    "unreadable_images",
    "refused_paths",
    "surplus_placeholders",
    "duplicate_samples",
    "malformed_entries",
    "damaged_shards",
]
ProblemKind = Literal[DroppedKind, "added_placeholders", "duplicate_ids", "duplicate_images"]


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
        unreadable_images: dropped: the file is no image, or is damaged.
        refused_paths: dropped: the path leads out of the folder, or is not Unicode.
        surplus_placeholders: dropped: the text has more ``<image>`` than images.
        duplicate_samples: dropped: an earlier WebDataset sample or member has the same name.
        malformed_entries: dropped: a .json member that is no conversation, or an entry that lacks
            ``<image>`` and has no human turn to put it in.
        damaged_shards: tars that were read in part or not at all, or hold no image.
        added_placeholders: kept: the missing ``<image>`` was put before the first question.
        duplicate_ids: kept: an earlier conversation has the same id.
        duplicate_images: kept as another name: an earlier file has the same bytes.
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
    added_placeholders: tuple[Problem, ...] = ()
    duplicate_ids: tuple[Problem, ...] = ()
    duplicate_images: tuple[Problem, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Every field: a number as it is, a list as its length."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: len(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @property
    def num_dropped(self) -> int:
        """How many entries, images or shards were dropped."""
        return sum(len(getattr(self, kind)) for kind in get_args(DroppedKind))

    def write(self, path: Path) -> None:
        """Write the report as JSON: the same report gives the same bytes."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8", errors="replace")
