"""Read and check the images that a pack names, in several threads.

Input: ``ImageSource``: a file, a member of a tar, or bytes. Output, in the same order:
``UsableImage`` or ``RejectedImage``. Used by ``corpus.pack``, ``corpus.parquet`` and
``corpus.webdataset``. What an image is, its bytes decide: the same file is treated alike under any
name.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from movekd.corpus.decode import FILE_EXTENSIONS, ImageInfo, probe_image
from movekd.corpus.report import ProblemKind
from movekd.corpus.tar import TarMember, read_member
from movekd.errors import UnreadableImageError, shorten
from movekd.files.reading import SpecialFileError, open_regular

MAX_IMAGE_BYTES = 2**30
"""Largest image file. Pillow's limit on pixels allows no more for any format but the rarest."""

HEAD_BYTES = 16
"""As many bytes show what an image is; Pillow looks at no more."""

_MAX_NAME_CHARACTERS = 4096


@dataclass(frozen=True)
class ImageSource:
    """Where an image lies: a file that will be packed, or a member of a tar that is only indexed.

    Attributes:
        names: the image's names; reports use the last one.
        path: the image file, or the tar or Parquet file that holds it.
        member: None for a file.
        other: kind of the problem if the bytes are no image.
        data: the bytes, if they have been read from a Parquet file.
    """

    names: list[str]
    path: Path
    member: TarMember | None = None
    other: ProblemKind = "unreadable_images"
    data: bytes | None = None


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
    Image.init()  # here, because its registry is no thread's business
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque[Future[UsableImage | RejectedImage]] = deque()
        for source in sources:
            if len(pending) == 2 * num_workers:
                yield pending.popleft().result()
            pending.append(pool.submit(_examine, source))
        while pending:
            yield pending.popleft().result()


def is_image(head: bytes) -> bool:
    """Return whether the first ``HEAD_BYTES`` of a file are those of a format that is read."""
    Image.init()
    accepts = (Image.OPEN[name][1] for name in FILE_EXTENSIONS if name in Image.OPEN)
    return any(accept(head) for accept in accepts if accept is not None and len(head) > 1)


def refused_path(name: str, whole: str) -> str:
    """Return why a path below a folder or in a tar is refused; an empty string if it is not.

    Args:
        name: the path.
        whole: what it must not leave: "image folder" or "tar".
    """
    path = PurePosixPath(name)
    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        return f"{shorten(name)} is not Unicode; rename it"
    if path.is_absolute() or ".." in path.parts:
        return f"{shorten(name)} leads out of the {whole}"
    if len(name) > _MAX_NAME_CHARACTERS:
        return f"{shorten(name)} is longer than {_MAX_NAME_CHARACTERS:,} characters"
    return ""


def _examine(source: ImageSource) -> UsableImage | RejectedImage:
    """Read and decode one image. Pillow and hashlib release the GIL, so threads run in parallel."""
    name = source.names[-1]
    whole = "image folder" if source.member is None else "tar"
    if reason := refused_path(name, whole):
        return RejectedImage(source, "refused_paths", reason)
    shown = shorten(name)
    try:
        data = _read(source)
    except (FileNotFoundError, NotADirectoryError):
        reason = f"{shown} does not exist in the image folder"
        return RejectedImage(source, "missing_files", reason)
    except SpecialFileError:
        reason = f"{shown} is no regular file; expected an image file"
        return RejectedImage(source, "special_files", reason)
    except _NoImageError as error:
        known = ", ".join(sorted(set(FILE_EXTENSIONS.values())))
        reason = f"{shown}: {error} are no image that can be read; expected one of {known}."
        return RejectedImage(source, source.other, reason)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return RejectedImage(source, "unreadable_images", f"{shown} cannot be read: {reason}")
    try:
        info = probe_image(data)
    except UnreadableImageError as error:
        return RejectedImage(source, "unreadable_images", f"{shown}: {error}")
    key = hashlib.sha256(data).hexdigest()
    return UsableImage(source, key, info, len(data), data if source.member is None else b"")


def _read(source: ImageSource) -> bytes:
    """Return the bytes of an image; raises _NoImageError after its first bytes, or OSError."""
    member = source.member
    if source.data is not None:
        _require_image(source.data[:HEAD_BYTES], len(source.data))
        return source.data
    if member is None:
        if source.path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        with open_regular(source.path) as file:
            head, size = file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size
            _require_image(head, size)
            return head + file.read(max(size - len(head), 0))
    head = read_member(source.path, member._replace(size=min(member.size, HEAD_BYTES)))
    _require_image(head, member.size)
    return read_member(source.path, member)


def _require_image(head: bytes, size_bytes: int) -> None:
    if not is_image(head):
        raise _NoImageError(f"{size_bytes:,} bytes")
    if size_bytes > MAX_IMAGE_BYTES:
        raise OSError(None, f"it has more than {MAX_IMAGE_BYTES:,} bytes")


class _NoImageError(Exception):
    """The bytes are of no image format that is read."""
