"""Write shards as tar files, and list the members of any tar with their byte offsets.

A shard is a plain USTAR file whose members have WebDataset's names. The same images in the same
order give the same bytes.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from movekd.errors import CorpusError, shorten
from movekd.files.reading import SpecialFileError, open_regular

MAX_HEADER_BYTES = 256 * 1024
"""Most bytes of the headers of one member: names, attributes, the map of a sparse file."""

_MANY_DIGITS = re.compile(rb"\d{256}")
_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK  # two empty blocks end a tar


class TarMember(NamedTuple):
    """A file in a tar: name, offset and size of its bytes, and why it cannot be read, if so."""

    name: str
    offset: int
    size: int
    refusal: str = ""


class ShardWriter:
    """Write members to ``shard-00000.tar``, ``shard-00001.tar`` ... in one folder.

    A new shard begins before a member that would exceed ``max_shard_bytes``. A larger member gets
    its own shard. Call ``close`` at the end.
    """

    def __init__(self, out_dir: Path, max_shard_bytes: int):
        self._out_dir = out_dir
        self._max_bytes = max_shard_bytes
        self._num_shards, self._shard = 0, ""
        self._file: BinaryIO | None = None
        self._position = 0

    def add(self, name: str, data: bytes) -> tuple[str, int]:
        """Append one member; return the shard's file name and the offset of ``data`` in it."""
        member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the mode is 0644
        member.size = len(data)
        header = member.tobuf(tarfile.USTAR_FORMAT)
        padding = bytes(-len(data) % _BLOCK)
        length = len(header) + len(data) + len(padding)
        if self._file is None or self._position + length + _END > self._max_bytes:
            self.close()
            self._shard = f"shard-{self._num_shards:05d}.tar"
            self._file = (self._out_dir / self._shard).open("wb")
            self._num_shards += 1
        self._file.write(header)
        self._file.write(data)
        self._file.write(padding)
        offset = self._position + len(header)
        self._position += length
        return self._shard, offset

    def close(self) -> None:
        """End the open shard."""
        file, self._file, self._position = self._file, None, 0
        if file is not None:
            with file:
                file.write(bytes(_END))


def read_members(path: Path) -> Iterator[TarMember]:
    """Yield the files of a tar, without reading their bytes; folders are left out.

    A member that is no plain file, say a link, has the reason in ``refusal``.

    Raises:
        CorpusError: the tar is damaged or truncated, or no regular file; raised after its whole
            members.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            headers = _Headers(file)
            with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:") as tar:
                last = -1
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte for each
                    headers.left = MAX_HEADER_BYTES
                    if member.offset <= last or member.size < 0:
                        # a size below zero would lead back, and round and round
                        raise tarfile.ReadError(f"a wrong size at byte {member.offset}")
                    last = member.offset
                    end = member.offset_data + member.size
                    if not member.isdir() and (end <= size or not member.isreg()):
                        refusal = _refusal(member)
                        yield TarMember(member.name, member.offset_data, member.size, refusal)
                stopped_at = tar.offset
            file.seek(stopped_at)
            if any(file.read(_BLOCK)):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"no valid header at byte {stopped_at}")
    except SpecialFileError:
        raise CorpusError(
            f"{path} is no regular file; expected a plain tar. Put the tar itself there."
        ) from None
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        ValueError,
        OverflowError,  # a size of many digits
        RecursionError,  # headers for headers for headers
    ) as error:
        raise CorpusError(
            f"{path} is damaged or compressed ({shorten(error)}); expected a whole, plain tar. "
            "Copy it again, or decompress it."
        ) from None


def read_member(path: Path, member: TarMember) -> bytes:
    """Return the bytes of a member of a tar."""
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


class _Headers:
    """What tarfile reads of a tar: headers. It bounds them, because tarfile does not.

    A PAX header of 2 GiB would be read into memory, and tarfile's search for ``hdrcharset`` takes
    the square of the time of a long run of digits (CVE-2024-6232).
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.left = MAX_HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES:,} bytes")
        data = self._file.read(size)
        if size > _BLOCK and _MANY_DIGITS.search(data):
            raise tarfile.ReadError("a header with a number of more than 255 digits")
        return data


def _refusal(member: tarfile.TarInfo) -> str:
    """Return why a member cannot be read as a file; an empty string if it can."""
    if member.issym() or member.islnk():
        return f"is a link to {shorten(member.linkname)}"
    if member.issparse():
        return "is a sparse file"
    return "" if member.isreg() else "is no regular file"


def split_member(name: str) -> tuple[str, str] | None:
    """Return sample key and extension of a member as WebDataset does, None if it has neither.

    The key ends at the first dot of the last path component; the extension is in lower case.

    Source: webdataset/webdataset webdataset/tariterators.py (base_plus_ext).
    """
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name, re.DOTALL)
    return (match[1], match[2].lower()) if match else None
