"""Find the Parquet files that `movekd shards pack --parquet` names: files, folders and globs.

Input: what the user gave. Output: ``ParquetFiles``, in the order given, each file once. Reports and
the names of images call a file by its path below the folder that all of them have in common, so
that the same files give the same corpus on every machine.
"""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from movekd.corpus.folder import list_folder
from movekd.corpus.image_source import refused_path
from movekd.corpus.media import suffix
from movekd.corpus.report import ProblemKind
from movekd.errors import ConfigError, shorten

LeftOut = tuple[str, ProblemKind, str]
"""(path, kind, reason) of something that is not read."""


class ParquetFiles(NamedTuple):
    """The Parquet files to read, and what else lies beside them.

    Attributes:
        paths: label -> absolute path. The label is the path below the common folder, with ``/``.
        left_out: other files, by their labels, and folders that were not entered.
    """

    paths: dict[str, Path]
    left_out: list[LeftOut]


def list_parquet(sources: Sequence[str], ours: Path | None = None) -> ParquetFiles:
    """Return the Parquet files that the sources name.

    A folder stands for all .parquet files below it. A source that does not exist is read as a glob.
    Links to folders are not followed, except where the source itself is one.

    Args:
        sources: files, folders and globs.
        ours: the corpus folder that is written; what movekd wrote into it is left out.

    Raises:
        ConfigError: a source names no Parquet file, or a file has a name that no table can hold.
    """
    found: dict[str, None] = {}
    others: list[LeftOut] = []
    for source in sources:
        files = _expand(source, ours, others)
        if not files:
            raise ConfigError(
                f"--parquet {shorten(source)} names no .parquet file; expected a Parquet file, a "
                "folder of them, or a glob in quotation marks. Correct the path."
            )
        found.update(dict.fromkeys(files))
    root = os.path.commonpath([os.path.dirname(path) for path in found])
    paths = {os.path.relpath(path, root): Path(path) for path in found}
    for label in paths:
        if reason := refused_path(label, "folder"):
            raise ConfigError(
                f"--parquet: {reason}; expected a file name of Unicode. Give the file another name."
            )
    left_out = {(os.path.relpath(path, root), kind, reason) for path, kind, reason in others}
    return ParquetFiles(paths, sorted(left_out))


def _expand(source: str, ours: Path | None, others: list[LeftOut]) -> list[str]:
    """Return the absolute paths of a source's Parquet files; append what else it names."""
    if os.path.lexists(source) and not os.path.isdir(source):
        return [os.path.abspath(source)]
    is_folder = os.path.isdir(source)
    listed: list[str] = []
    for path in map(os.path.abspath, [source] if is_folder else sorted(glob.glob(source))):
        if not os.path.isdir(path):
            listed.append(path)
            continue
        if os.path.islink(path) and not is_folder:
            others.append((path, "skipped_folders", "is a link to a folder; name it by itself"))
            continue
        folder = list_folder(Path(path), ours)
        listed += [os.path.join(path, name) for name in folder.files]
        for name, reason in folder.skipped:
            others.append((os.path.join(path, name), "skipped_folders", reason))
    for path in listed:
        if suffix(path) != "parquet":
            others.append((path, "unused_files", "it is no .parquet file"))
    return [path for path in listed if suffix(path) == "parquet"]
