"""Start a local S3 server for tests, set its faults, and copy a cache to it."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

from movekd.cache.storage import open_storage

SERVER = Path(__file__).parent / "s3_server.py"


class Server:
    """A running server: its address, and the faults that it is told to make."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def fail(self, *faults: tuple[str, str, str, int]) -> None:
        """Set the faults (method, part of the path, kind, times); forget the log."""
        keys = ("method", "match", "kind", "times")
        content = json.dumps([dict(zip(keys, fault, strict=True)) for fault in faults]).encode()
        request = urllib.request.Request(f"{self.endpoint}/__faults__", content, method="POST")
        urllib.request.urlopen(request).close()

    def log(self) -> list[str]:
        """Return the requests since ``fail``."""
        with urllib.request.urlopen(f"{self.endpoint}/__log__") as answer:
            requests: list[str] = json.load(answer)
            return requests


@contextmanager
def s3_server() -> Iterator[Server]:
    """Yield a server with an empty bucket named `bucket`, which the environment points to."""
    command = [sys.executable, str(SERVER)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert process.stdout is not None
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield Server(endpoint)
        process.kill()


def everything(storage: Any) -> dict[str, bytes]:
    """Return every file of a storage, name -> bytes."""
    return {name: storage.read(name) for name in storage.sizes()}


def upload(cache_dir: Path, url: str) -> None:
    """Copy a cache to S3, file by file, with its own client.

    fsspec caches its clients, and would look for the server of one module in the next.
    """
    client = boto3.client("s3")
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for name, content in everything(open_storage(cache_dir)).items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)
