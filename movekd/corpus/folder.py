"""List a folder that somebody else filled: every file, and every folder that is not entered.

Links to files are listed as files. Links to folders are not followed: one may lead to ``/``, or
back to where it is.
"""

import os
from pathlib import Path
from typing import NamedTuple

from movekd.errors import CorpusError


class FolderList(NamedTuple):
    """What lies below a folder.

    Attributes:
        files: paths below it with ``/``, sorted: everything that is no folder.
        skipped: (path, reason) of the folders that were not entered.
    """

    files: list[str]
    skipped: list[tuple[str, str]]


def list_folder(folder: Path, ours: Path | None = None) -> FolderList:
    """Return what lies below a folder, without what movekd writes or has written there.

    Args:
        folder: the folder.
        ours: a folder that movekd writes; it may lie in ``folder`` or be the same.
    """
    files: list[str] = []
    skipped: list[tuple[str, str]] = []
    below = [""]
    mine = ours if ours is not None and ours.is_dir() else None
    while below:
        parent = below.pop()
        try:
            is_ours = mine is not None and os.path.samefile(folder / parent, mine)
            with os.scandir(folder / parent) as found:
                entries = list(found)
        except OSError as error:
            skipped.append((parent.rstrip("/"), f"cannot be read: {error.strerror}"))
            continue
        if is_ours and parent:
            continue
        for entry in entries:
            name = parent + entry.name
            if is_ours and _is_of_a_corpus(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                below.append(name + "/")
            elif entry.is_symlink() and os.path.isdir(entry.path):
                reason = "is a link to a folder; pack the folder that it leads to by itself"
                skipped.append((name, reason))
            else:
                files.append(name)
    return FolderList(sorted(files), sorted(skipped))


def require_folder(path: Path) -> None:
    """Raise CorpusError unless ``path`` is a folder."""
    if not path.is_dir():
        raise CorpusError(f"{path} is no folder; expected a folder of images. Correct the path.")


def _is_of_a_corpus(name: str) -> bool:
    """Return whether a corpus has a file or folder of this name at its top."""
    return name in _OF_A_CORPUS or name.startswith(_HIDDEN)


_OF_A_CORPUS = {"index.parquet", "names.parquet", "conversations.jsonl", "report.json"}
_HIDDEN = (".movekd", ".pack")  # records, staging folders, locks
