"""Read and check the images that a pack names, in several threads.

Input: ``ImageSource``, a file or a member of a tar. Output, in the same order: ``UsableImage`` or
``RejectedImage``. Used by ``corpus.pack`` and ``corpus.webdataset``.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from movekd.corpus.decode import FILE_EXTENSIONS, ImageInfo, probe_image
from movekd.corpus.report import ProblemKind
from movekd.corpus.tar import TarMember, read_member
from movekd.errors import CorpusError, UnreadableImageError

IMAGE_EXTENSIONS = {*FILE_EXTENSIONS.values(), "jpeg", "tif"}
"""File extensions of images, in lower case."""


@dataclass(frozen=True)
class ImageSource:
    """Where an image lies: a file that will be packed, or a member of a tar that is only indexed.

    Attributes:
        names: the image's names; reports use the last one.
        path: the image file, or the tar.
        member: None for a file.
    """

    names: list[str]
    path: Path
    member: TarMember | None = None


@dataclass(frozen=True)
class UsableImage:
    """An image that can be decoded; ``data`` is empty if it is only indexed."""

    source: ImageSource
    key: str
    info: ImageInfo
    size_bytes: int
    data: bytes


@dataclass(frozen=True)
class RejectedImage:
    """An image that cannot be used, and why."""

    source: ImageSource
    kind: ProblemKind
    reason: str


def examine_images(
    sources: Iterable[ImageSource], num_workers: int
) -> Iterator[UsableImage | RejectedImage]:
    """Yield what each source holds, in order; at most two images per thread are in memory."""
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque[Future[UsableImage | RejectedImage]] = deque()
        for source in sources:
            if len(pending) == 2 * num_workers:
                yield pending.popleft().result()
            pending.append(pool.submit(_examine, source))
        while pending:
            yield pending.popleft().result()


def printable(name: str) -> str:
    """Return a name with question marks for bytes that are not Unicode."""
    return name.encode("utf-8", "replace").decode("utf-8")


def require_folder(path: Path) -> None:
    """Raise CorpusError unless ``path`` is a folder."""
    if not path.is_dir():
        raise CorpusError(f"{path} is no folder; expected a folder of images. Correct the path.")


def _examine(source: ImageSource) -> UsableImage | RejectedImage:
    """Read and decode one image. Pillow and hashlib release the GIL, so threads run in parallel."""
    name = source.names[-1]
    path = PurePosixPath(name)
    if printable(name) != name:
        reason = f"{printable(name)} is not Unicode; rename it"
        return RejectedImage(source, "refused_paths", reason)
    if source.member is None and (path.is_absolute() or ".." in path.parts):
        return RejectedImage(source, "refused_paths", f"{name} leads out of the image folder")
    try:
        member = source.member
        data = source.path.read_bytes() if member is None else read_member(source.path, member)
    except (FileNotFoundError, NotADirectoryError):
        reason = f"{name} does not exist in the image folder"
        return RejectedImage(source, "missing_files", reason)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return RejectedImage(source, "unreadable_images", f"{name} cannot be read: {reason}")
    try:
        info = probe_image(data)
    except UnreadableImageError as error:
        return RejectedImage(source, "unreadable_images", f"{name}: {error}")
    key = hashlib.sha256(data).hexdigest()
    return UsableImage(source, key, info, len(data), data if source.member is None else b"")
