"""Read and write the files of a cache, in a local folder or an object store.

A name is a path below the cache, with slashes: ``clip.zarr/tokens/c/0/0/0``. Every file appears
whole or not at all: a reader sees the old file or the new one. All code that reads or writes a
cache uses this interface, except ``mapped_rows`` and ``tensorstore_rows``, which read rows.
"""

import contextlib
import errno
import io
import itertools
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from pyarrow import fs

from movekd.errors import CacheError, ConfigError, shorten
from movekd.files.ownership import fsync
from movekd.threads import num_cpus

Buffer = bytes | bytearray | memoryview
_BLOCK_BYTES = 8 * 2**20
_LOOKS_AT_ONCE = 10_000
_READING = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: opening a FIFO without it waits for a writer."""
_ABSENT = (FileNotFoundError, NotADirectoryError)
_THIS_PROCESS = uuid.uuid4().hex[:8]
"""Machines that share a file system can have processes of the same number."""


class Storage(Protocol):
    """The place of one cache. Picklable; usable from any thread and after a fork."""

    url: str
    """What users write: a path, or ``s3://bucket/prefix``."""
    local_dir: Path | None
    """The folder, or None for an object store."""

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """Return a file's content. Raises FileNotFoundError; CacheError for every other failure.

        A file of more than ``max_bytes`` is such a failure, and so is anything but a regular file.
        """

    def read_many(self, names: Sequence[str], max_bytes: int | None = None) -> dict[str, bytes]:
        """Return the content of several small files; missing files are left out. See ``read``."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's content in parts. Raises as ``read``."""

    def write(self, name: str, buffers: Sequence[Buffer]) -> None:
        """Write a file whole or not at all, and durably. Raises CacheError."""

    def write_many(self, files: Mapping[str, Sequence[Buffer]]) -> None:
        """Write several files, each whole or not at all. Faster than one after the other."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that must not exist yet; return whether it has this content now.

        In an object store, exactly one of several callers writes. In a folder, the caller holds
        the lock that keeps others away.
        """

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

    def delete_folder(self, name: str) -> None:
        """Delete everything below a name; do nothing if the folder is missing."""

    def delete_leftovers(self, name: str) -> None:
        """Delete temporary files of killed writes; the caller holds the lock of the name."""

    def exists(self, name: str) -> bool:
        """Return whether a file has this name."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return every file below a folder, name -> bytes, sorted by name."""

    def sizes_of(self, folder: str, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes of some files below a folder in bytes; missing files are left out."""

    def files(self, folder: str) -> list[str]:
        """Return the files directly in a folder, sorted; cheaper than ``sizes``."""

    def folders(self) -> list[str]:
        """Return the names of the folders at the top, sorted."""

    def free_bytes(self) -> int | None:
        """Return the free space; None if it is unknown."""


def open_storage(url: "str | Path | Storage") -> Storage:
    """Return the place that a path or URL names. It may be empty.

    Raises:
        ConfigError: the scheme is unknown.
        CacheError: the client for this scheme is not installed.
    """
    if not isinstance(url, str | Path):
        return url
    if not str(url):
        raise ConfigError("the cache's name is empty; expected a folder or a URL.")
    try:
        is_text = b"\0" not in str(url).encode()
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise ConfigError(
            f"the cache's name {shorten(url)} is no UTF-8 text, or holds a NUL; the libraries that "
            "read its tables need such names. Rename the folder."
        )
    scheme, separator, rest = str(url).partition("://")
    if not separator:
        return LocalStorage(Path(url))
    if scheme == "file":
        return LocalStorage(Path("/" + rest.lstrip("/")))
    from movekd.cache.object_storage import SCHEMES, ObjectStorage

    if scheme not in SCHEMES:
        raise ConfigError(
            f"{url} has the scheme '{scheme}://'; expected a path, file://, "
            f"{', '.join(f'{known}://' for known in SCHEMES)}."
        )
    if not rest.strip("/"):
        raise ConfigError(f"{url} names no bucket; expected {scheme}://BUCKET/PREFIX.")
    return ObjectStorage(str(url).rstrip("/"))


class LocalStorage:
    """A cache in a folder of a local or mounted file system."""

    def __init__(self, folder: Path) -> None:
        self.local_dir: Path | None = folder
        self.url = str(folder)
        self._folder = folder

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """Return a file's content."""
        try:
            return _read_regular(f"{self._folder}/{name}", max_bytes)
        except _ABSENT:
            raise FileNotFoundError(name) from None
        except OSError as error:
            raise CacheError(f"{self._folder / name} cannot be read: {error.strerror}.") from None

    def read_many(self, names: Sequence[str], max_bytes: int | None = None) -> dict[str, bytes]:
        """Return the content of several small files; missing files are left out."""
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = self.read(name, max_bytes)
        return found

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's content in parts."""
        try:
            with open_regular(f"{self._folder}/{name}") as file:
                yield from iter(lambda: file.read(_BLOCK_BYTES), b"")
        except _ABSENT:
            raise FileNotFoundError(name) from None
        except OSError as error:
            raise CacheError(f"{self._folder / name} cannot be read: {error.strerror}.") from None

    def write(self, name: str, buffers: Sequence[Buffer]) -> None:
        """Write a file whole or not at all, and durably."""
        self.write_many({name: buffers})

    def write_many(self, files: Mapping[str, Sequence[Buffer]]) -> None:
        """Write to temporary names, fsync, rename, fsync the folders.

        All files take each step together, so that one commit of the file system's journal serves
        them all. Temporary names lie at the top of the cache: a Zarr group must hold no foreign
        file.
        """
        own = f"{os.getpid()}-{_THIS_PROCESS}"
        temporary = {n: self._folder / f".{n.replace('/', '.')}.{own}.tmp" for n in files}
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened: list[int] = []
        changed: dict[Path, None] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, buffers in files.items():
                opened.append(os.open(temporary[name], flags, 0o644))
                for buffer in buffers:
                    _write_all(opened[-1], buffer)
            for descriptor in opened:
                os.fsync(descriptor)
            for name in files:
                changed |= dict.fromkeys(_make_folder((self._folder / name).parent))
                temporary[name].replace(self._folder / name)
            for folder in changed:
                fsync(folder)
        except OSError as error:
            for path in temporary.values():
                with contextlib.suppress(OSError):
                    path.unlink()
            name = next((n for n in files if str(n) in str(error.filename)), next(iter(files)))
            raise CacheError(
                f"{self._folder / name} cannot be written: {error.strerror}. What is sealed is "
                "safe; make room or mend the disk, then run the same command again."
            ) from None
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that must not exist yet; return whether it has this content now."""
        if not self.exists(name):
            self.write(name, [content])
        return self.read(name) == content

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with self._errors(name, "deleted"), contextlib.suppress(*_ABSENT):
            (self._folder / name).unlink()

    def delete_folder(self, name: str) -> None:
        """Delete everything below a name; do nothing if the folder is missing."""
        with self._errors(name, "deleted"), contextlib.suppress(*_ABSENT):
            shutil.rmtree(self._folder / name)

    def delete_leftovers(self, name: str) -> None:
        """Delete the temporary files of killed writes of a file or below a folder."""
        with self._errors(name, "deleted"):
            for path in list(self._folder.glob(f".{name}.*.tmp")):
                path.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        """Return whether a file has this name."""
        with self._errors(name, "read"), contextlib.suppress(*_ABSENT):
            return stat.S_ISREG((self._folder / name).stat().st_mode)
        return False

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return every file below a folder, name -> bytes."""
        found, left = {}, [folder]
        with self._errors(folder, "listed"), contextlib.suppress(*_ABSENT):
            while left:
                below = left.pop()
                with os.scandir(self._folder / below) as entries:
                    for entry in entries:
                        name = f"{below}/{entry.name}" if below else entry.name
                        if entry.is_dir():
                            left += [] if entry.is_symlink() else [name]
                            continue
                        with contextlib.suppress(FileNotFoundError):  # a build beside us renames
                            found[name] = entry.stat().st_size
        return dict(sorted(found.items()))

    def sizes_of(self, folder: str, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes of some regular files: faster than listing, which visits each folder.

        Arrow looks at them without Python's lock, so that all CPUs do.
        """
        start = f"{self._folder}/"
        files = fs.LocalFileSystem()

        def look(first: int) -> list[fs.FileInfo]:
            some = [start + name for name in names[first : first + _LOOKS_AT_ONCE]]
            return list(files.get_file_info(some))

        with self._errors(folder, "read"), ThreadPoolExecutor(num_cpus()) as pool:
            found = itertools.chain(*pool.map(look, range(0, len(names), _LOOKS_AT_ONCE)))
            return {
                name: info.size for name, info in zip(names, found, strict=True) if info.is_file
            }

    def files(self, folder: str) -> list[str]:
        """Return the files directly in a folder, sorted."""
        prefix = f"{folder}/" if folder else ""
        with (
            self._errors(folder, "listed"),
            contextlib.suppress(*_ABSENT),
            os.scandir(self._folder / folder) as entries,
        ):
            return sorted(prefix + entry.name for entry in entries if entry.is_file())
        return []

    def folders(self) -> list[str]:
        """Return the names of the folders at the top."""
        with self._errors("", "listed"), contextlib.suppress(*_ABSENT):
            return sorted(path.name for path in self._folder.iterdir() if path.is_dir())
        return []

    def free_bytes(self) -> int | None:
        """Return the free bytes of the file system that the folder lies on, or would lie on."""
        folder = self._folder.resolve()
        with self._errors("", "read"):
            while not folder.exists():
                folder = folder.parent
            return shutil.disk_usage(folder).free

    @contextlib.contextmanager
    def _errors(self, name: str, done: str) -> Iterator[None]:
        """Turn an error of the file system into a CacheError."""
        try:
            yield
        except OSError as error:
            where = error.filename or self._folder / name
            raise CacheError(f"{where} cannot be {done}: {error.strerror}.") from None


def too_large(where: str, max_bytes: int) -> str:
    """Return the sentence about a file that ``read`` refuses."""
    return (
        f"{where} has more than {max_bytes:,} bytes; expected a small file that movekd wrote. Run "
        "`movekd cache verify`."
    )


def open_regular(path: str) -> io.FileIO:
    """Open a regular file for reading, unbuffered; raises OSError for anything else.

    ``path`` is a string: with a Path, opening and reading a seal takes twice as long.
    """
    descriptor = os.open(path, _READING)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return io.FileIO(descriptor)
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file", path)


def _read_regular(path: str, max_bytes: int | None) -> bytes:
    """Return the content of a regular file; raises as ``open_regular``, CacheError for its size.

    A hundred thousand seals are read at a time, so each takes one look at it and one read.
    """
    descriptor = os.open(path, _READING)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", path)
        if max_bytes is not None and status.st_size > max_bytes:
            raise CacheError(too_large(path, max_bytes))
        content = os.read(descriptor, status.st_size + 1)
        if len(content) == status.st_size:
            return content
        parts = [content]  # it grows, or is larger than one read
        while parts[-1]:
            parts.append(os.read(descriptor, _BLOCK_BYTES))
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, buffer: Buffer) -> None:
    """Write a whole buffer; a single call writes at most 2 GiB."""
    left = memoryview(buffer).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents; return the folders whose entries change."""
    changed = [folder]
    missing = folder
    while not missing.exists():
        missing = missing.parent
        changed.append(missing)
    folder.mkdir(parents=True, exist_ok=True)
    return changed
