"""Read and write the files of a cache in S3, Google Cloud Storage, or this process' memory.

The second implementation of ``storage.Storage``. It uses fsspec, which works in forked DataLoader
workers; clients with native threads hang or abort there (docs/decisions/0005-object-stores.md).
Rows are read by ``tensorstore_rows``.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from movekd.cache.storage import too_large
from movekd.errors import CacheError

SCHEMES = {"s3": "s3", "gs": "gs", "memory": ""}
"""Scheme -> the extra of movekd that installs its client."""
S3_ATTEMPTS = 5
"""Attempts of botocore per request; s3fs also repeats requests that break on the way."""


class ObjectStorage:
    """A cache below a prefix of S3, Google Cloud Storage, or this process' memory (for tests).

    Credentials and endpoints come from the environment: ``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS`` and others.
    """

    def __init__(self, url: str) -> None:
        self.local_dir: Path | None = None
        self.url = url
        self.scheme = url.partition("://")[0]
        self.options = _options(self.scheme)
        self._root = _client(url)[1].rstrip("/")

    @property
    def _files(self) -> Any:
        """The client of this process and thread, kept by fsspec; a forked child gets a new one."""
        return _client(self.url)[0]

    @property
    def bucket_and_prefix(self) -> tuple[str, str]:
        """The bucket, and the prefix in it without a final slash."""
        bucket, _, prefix = self._root.lstrip("/").partition("/")
        return bucket, prefix

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """Return an object's content."""
        with self._errors("read", name):
            content = bytes(self._files.cat_file(self._path(name), **_up_to(max_bytes)))
            return self._limited(name, content, max_bytes)

    def read_many(self, names: Sequence[str], max_bytes: int | None = None) -> dict[str, bytes]:
        """Return the content of several small objects, all requested at once."""
        if not names:
            return {}
        paths = {self._path(name): name for name in names}
        with self._errors("read", names[0]):
            got = self._files.cat(list(paths), on_error="return", **_up_to(max_bytes))
            found = {}
            for path, content in got.items():
                if isinstance(content, FileNotFoundError):
                    continue
                if isinstance(content, Exception):
                    raise content
                name = paths.get(path) or paths[f"/{path.lstrip('/')}"]
                found[name] = self._limited(name, bytes(content), max_bytes)
        return {name: found[name] for name in names if name in found}

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield an object's content in one part: a Zarr shard has at most 128 MiB."""
        yield self.read(name)

    def write(self, name: str, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write an object in one PUT, a large one in several parts. It appears whole."""
        content = b"".join(buffers)
        with self._errors("written", name):
            self._files.pipe_file(self._path(name), content)

    def write_many(self, files: Mapping[str, Sequence[bytes | bytearray | memoryview]]) -> None:
        """Write several objects, one after the other; parts of a large one are sent together."""
        for name, buffers in files.items():
            self.write(name, buffers)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object that must not exist yet; return whether it has this content now.

        If the server applies a PUT and answers with an error, the client repeats it and finds its
        own object; the content shows that.
        """
        with self._errors("written", name):
            try:
                self._files.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return self.read_many([name]).get(name) == content
        return True

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with self._errors("deleted", name), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def delete_folder(self, name: str) -> None:
        """Delete every object below a name."""
        with self._errors("deleted", name):
            paths = list(self._find(name))
            if paths:
                self._files.rm(paths)

    def delete_leftovers(self, name: str) -> None:
        """Do nothing: an object appears whole or not at all."""

    def exists(self, name: str) -> bool:
        """Return whether an object has this name."""
        with self._errors("read", name), contextlib.suppress(FileNotFoundError):
            # not isfile(): if the server does not answer, it says that the file is missing
            return bool(self._files.info(self._path(name))["type"] == "file")
        return False

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return every object below a folder, name -> bytes."""
        with self._errors("listed", folder):
            found = self._find(folder)
        start = len(self._root.lstrip("/")) + 1
        named = {path.lstrip("/")[start:]: size for path, size in found.items()}
        return dict(sorted(named.items()))

    def sizes_of(self, folder: str, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes of some objects from one listing, a thousand per request."""
        found = self.sizes(folder)
        return {name: found[name] for name in names if name in found}

    def folders(self) -> list[str]:
        """Return the names of the prefixes at the top."""
        return self._list("", "directory")

    def files(self, folder: str) -> list[str]:
        """Return the objects directly in a folder."""
        prefix = f"{folder}/" if folder else ""
        return [f"{prefix}{name}" for name in self._list(folder, "file")]

    def starting_with(self, name: str) -> list[str]:
        """Return the objects whose names start with ``name``, without listing the others."""
        folder, _, start = name.rpartition("/")
        with self._errors("listed", name), contextlib.suppress(FileNotFoundError):
            found = self._files.find(self._path(folder), prefix=start)
            names = (path.rpartition("/")[2] for path in found)
            inside = f"{folder}/" if folder else ""
            return sorted(f"{inside}{found}" for found in names if found.startswith(start))
        return []

    def free_bytes(self) -> int | None:
        """Return None: an object store has no limit."""
        return None

    def _limited(self, name: str, content: bytes, max_bytes: int | None) -> bytes:
        if max_bytes is not None and len(content) > max_bytes:
            raise CacheError(too_large(f"{self.url}/{name}", max_bytes))
        return content

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _find(self, folder: str) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError):
            found = self._files.find(self._path(folder), detail=True)
            return {path: int(info["size"]) for path, info in found.items()}
        return {}

    def _list(self, folder: str, kind: str) -> list[str]:
        with self._errors("listed", folder), contextlib.suppress(FileNotFoundError):
            entries = self._files.ls(self._path(folder), detail=True)
            paths = [entry["name"] for entry in entries if entry["type"] == kind]
            return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)
        return []

    @contextlib.contextmanager
    def _errors(self, done: str, name: str) -> Iterator[None]:
        """Turn an error of a client, after its retries, into a CacheError."""
        try:
            yield
        except CacheError:
            raise
        except FileNotFoundError:
            if done != "written":
                raise
            raise CacheError(
                f"{self.url}/{name} cannot be written: no bucket "
                f"'{self.bucket_and_prefix[0]}' exists. Create it, or correct --cache."
            ) from None
        except Exception as error:  # each client raises the errors of its library
            reason = re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
            is_refused = isinstance(error, PermissionError) or "redentials" in reason
            tried = "" if is_refused else "It was tried several times; "
            check = "check the endpoint, the credentials and the network, then run the same "
            raise CacheError(
                f"{self.url}/{name} cannot be {done}: {reason}. "
                f"{tried}{check if tried else check.capitalize()}command again. "
                "What is sealed is safe."
            ) from None


def _up_to(max_bytes: int | None) -> dict[str, int]:
    """Return the range that a request asks for: one byte more than is allowed."""
    return {} if max_bytes is None else {"start": 0, "end": max_bytes + 1}


def s3_settings() -> dict[str, Any]:
    """Return endpoint, region and kind of credentials for TensorStore, as botocore finds them.

    The environment has priority over the profile in ``~/.aws/config``.
    """
    from botocore.session import Session

    session = Session()
    profile: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # no such profile: the client has raised for that before
        profile = session.get_scoped_config()
    found: dict[str, Any] = {}
    get = os.environ.get
    endpoint = get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    region = get("AWS_REGION") or get("AWS_DEFAULT_REGION") or profile.get("region")
    if endpoint:
        found["endpoint"] = endpoint
    if region or endpoint:
        found["aws_region"] = region or "us-east-1"
    if get("AWS_ACCESS_KEY_ID"):
        found["aws_credentials"] = {"type": "environment"}
    return found


def _options(scheme: str) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        retries = {"max_attempts": S3_ATTEMPTS, "mode": "standard"}
        options["config_kwargs"] = {"retries": retries, "connect_timeout": 10, "read_timeout": 30}
    return options


def _client(url: str) -> tuple[Any, str]:
    """Return the fsspec client of a URL, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        client, path = url_to_fs(url, **_options(scheme))
    except ImportError:
        raise CacheError(
            f"{url}: the client for {scheme}:// is not installed; run "
            f"pip install 'movekd[{SCHEMES[scheme]}]'."
        ) from None
    except Exception as error:  # each client raises the errors of its library
        reason = re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
        raise CacheError(
            f"{url}: the client for {scheme}:// does not start ({reason}). Check the URL, the "
            "endpoint and the credentials, then run the same command again."
        ) from None
    return client, path
