"""Write shards as tar files, and list the members of any tar with their byte offsets.

A shard is a plain USTAR file whose members have WebDataset's names. The same images in the same
order give the same bytes.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from movekd.errors import CorpusError

_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK  # two empty blocks end a tar


class TarMember(NamedTuple):
    """A file in a tar: its name, and the offset and size of its bytes."""

    name: str
    offset: int
    size: int


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
    """Yield the regular files of a tar, without reading their bytes.

    Raises:
        CorpusError: the tar is damaged or truncated; raised after its whole members.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if member.isreg() and not member.issparse() and end <= size:
                    yield TarMember(member.name, member.offset_data, member.size)
            stopped_at = tar.offset
        with path.open("rb") as file:
            file.seek(stopped_at)
            if any(file.read(_BLOCK)):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"no valid header at byte {stopped_at}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise CorpusError(
            f"{path} is damaged or compressed ({error}); expected a whole, plain tar. "
            "Copy it again, or decompress it."
        ) from None


def read_member(path: Path, member: TarMember) -> bytes:
    """Return the bytes of a member of a tar."""
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def split_member(name: str) -> tuple[str, str] | None:
    """Return sample key and extension of a member as WebDataset does, None if it has neither.

    The key ends at the first dot of the last path component; the extension is in lower case.

    Source: webdataset/webdataset webdataset/tariterators.py (base_plus_ext).
    """
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name, re.DOTALL)
    return (match[1], match[2].lower()) if match else None
