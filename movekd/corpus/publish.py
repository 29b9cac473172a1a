"""Put a packed corpus into its folder, and replace only what movekd wrote.

``corpus.writer`` makes all files in a hidden folder; here they are moved into place, the index
last. So a folder with an index is complete. ``.movekd-files.json`` lists what a pack wrote, with
checksums (``files.ownership``): only files that are as listed are deleted. The list of a new corpus
is in place before its first file, and that of the old one goes after its last file. So a pack that
is killed at any instant can be run again.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from movekd.corpus.index import CONVERSATIONS_FILE, INDEX_FILE, NAMES_FILE
from movekd.errors import CorpusError, shorten
from movekd.files.lock import hold_lock
from movekd.files.ownership import (
    OWNERSHIP_FILE,
    OwnedFiles,
    changes,
    file_entry,
    read_owned,
    write_owned,
)

STAGING_DIR = ".packing"
LOCK_FILE = ".pack.lock"
REPORT_FILE = "report.json"

_MADE_BY = "movekd shards pack"
_TABLES = (NAMES_FILE, CONVERSATIONS_FILE, REPORT_FILE, INDEX_FILE)
_STAGED = re.compile(
    r"shard-\d{5,}\.tar|index\.parquet|names\.parquet|conversations\.jsonl|report\.json"
    r"|\.movekd-files\.json|\.\.movekd-files\.json\.\d+\.tmp"
)


@dataclass(frozen=True)
class Target:
    """The folder of a corpus, and what a pack may do with what lies in it.

    Attributes:
        folder: the folder; created if missing.
        writes_shards: whether shards are written, not only an index of tars that lie there.
        overwrite: replace another corpus.
        force: replace what is not provably movekd's, too: files that stand in the way, and those of
            a corpus without a list.
    """

    folder: Path
    writes_shards: bool
    overwrite: bool = False
    force: bool = False

    @property
    def is_guarded(self) -> bool:
        """Whether the folder holds a corpus that may only be replaced by the same one."""
        return (self.folder / INDEX_FILE).is_file() and not self.overwrite


@contextmanager
def staging_folder(target: Target) -> Iterator[Path]:
    """Yield an empty folder; move its files into place when the block ends without an error.

    Raises:
        CorpusError: another pack is writing to the folder, or something in it may not be replaced.
        OSError: the folder cannot be written.
    """
    folder, staging = target.folder, target.folder / STAGING_DIR
    is_new = not folder.exists()
    try:
        with hold_lock(folder / LOCK_FILE, lambda holder: _held(folder, holder), error=CorpusError):
            _refuse_early(target)
            _delete_leftover(staging)
            staging.mkdir()
            try:
                yield staging
                _publish(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds a corpus now
                folder.rmdir()


def _publish(staging: Path, target: Target) -> None:
    """Move the files of a new corpus into place, after those of the old one are deleted."""
    folder = target.folder
    new = write_owned(staging, sorted(os.listdir(staging)), _MADE_BY)
    old = _adopt(staging, new, target) if target.is_guarded else read_owned(folder)
    if old is not None and old.files == new.files and not changes(folder, old):
        return
    deletable = _deletable(new, old, target)
    # The index first: without it, nothing reads what is left as a corpus.
    for name in sorted(deletable, key=lambda name: name != INDEX_FILE):
        (folder / name).unlink(missing_ok=True)
    (staging / OWNERSHIP_FILE).replace(folder / OWNERSHIP_FILE)
    for name in sorted(new.files, key=lambda name: name == INDEX_FILE):
        (staging / name).replace(folder / name)


def _adopt(staging: Path, new: OwnedFiles, target: Target) -> OwnedFiles | None:
    """Return the list of a corpus; make one if it has none and holds the corpus of ``new``.

    The caller has compared the tables. Shards must be equal byte by byte.
    """
    folder = target.folder
    held = [name for name in new.files if (folder / name).is_file()]
    if (folder / OWNERSHIP_FILE).exists() or any(
        file_entry(folder / name) != new.files[name] for name in held if name not in _TABLES
    ):
        return read_owned(folder)
    entries = {name: file_entry(folder / name) for name in held}
    owned = write_owned(staging, entries, _MADE_BY)  # here, so that a kill leaves nothing outside
    (staging / OWNERSHIP_FILE).replace(folder / OWNERSHIP_FILE)
    write_owned(staging, new.files, _MADE_BY)
    return owned


def _deletable(new: OwnedFiles, old: OwnedFiles | None, target: Target) -> set[str]:
    """Return which files may go.

    Raises:
        CorpusError: something else stands in the way.
    """
    folder = target.folder
    ours = set() if old is None else set(old.files)
    in_the_way = {name for name in new.files if os.path.lexists(folder / name)} - ours
    if target.force:
        if old is None:
            ours |= {name for name in _TABLES if os.path.lexists(folder / name)}
            if target.writes_shards:
                ours |= {path.name for path in folder.glob("shard-[0-9]*.tar")}
        return ours | in_the_way
    wrong = {} if old is None else _changed(folder, old)
    wrong |= dict.fromkeys(in_the_way, "not of movekd")
    _refuse(folder, wrong)
    return ours


def _refuse_early(target: Target) -> None:
    """Refuse what will not be replaced, before hours of work.

    Raises:
        CorpusError: files are not as movekd wrote them, or nothing says which ones it wrote.
    """
    folder = target.folder
    old, has_index = read_owned(folder), os.path.lexists(folder / INDEX_FILE)
    if target.force:
        return
    if old is not None:
        _refuse(folder, _changed(folder, old))
    elif has_index and target.overwrite:
        what = "its index, names, conversations, report"
        what += " and shard-*.tar" if target.writes_shards else ""
        raise CorpusError(
            f"{folder} holds a corpus without {OWNERSHIP_FILE}, so nothing proves which of its "
            "files movekd wrote; expected that list of a pack. Choose another folder, or give "
            f"--overwrite --force, which deletes {what}."
        )
    foreign = {path.name for path in folder.glob("*.tar")} - set(old.files if old else ())
    if foreign and target.writes_shards and not target.overwrite and not has_index:
        raise CorpusError(
            f"{folder} holds tars but no {INDEX_FILE}; expected an empty folder or a corpus. "
            "Index them where they are with --webdataset, or choose another folder."
        )


def _changed(folder: Path, owned: OwnedFiles) -> dict[str, str]:
    """Return the files that are there, but not as listed."""
    return {name: change for name, change in changes(folder, owned).items() if change != "missing"}


def _refuse(folder: Path, wrong: dict[str, str]) -> None:
    if not wrong:
        return
    first = ", ".join(f"{shorten(name)} ({why})" for name, why in sorted(wrong.items())[:3])
    raise CorpusError(
        f"{folder} holds files that a pack would replace and that are not as movekd wrote them: "
        f"{first}{', ...' if len(wrong) > 3 else ''} ({len(wrong)} in all). Move them away, choose "
        "another folder, or give --overwrite --force to replace them."
    )


def _delete_leftover(staging: Path) -> None:
    """Delete the staging folder of a killed pack.

    Raises:
        CorpusError: it holds something that no pack writes.
    """
    if not os.path.lexists(staging):
        return
    strange = [""]
    if stat.S_ISDIR(staging.lstat().st_mode):
        strange = [
            path.name
            for path in sorted(staging.iterdir())
            if not (_STAGED.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode))
        ]
    if strange:
        raise CorpusError(
            f"{staging / shorten(strange[0])} is nothing that a pack writes; expected a folder of "
            "an interrupted pack, or none. Move it away and run the same command again."
        )
    for path in staging.iterdir():
        path.unlink()
    staging.rmdir()


def _held(folder: Path, holder: str) -> CorpusError:
    return CorpusError(
        f"another pack is writing to {folder} ({holder}); expected one at a time. Wait for it, or "
        "stop it and run this command again."
    )
