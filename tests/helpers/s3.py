"""The S3 server of tests/s3_server.py, running, with this process' environment pointing to it."""

import json
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

SERVER = Path(__file__).parents[1] / "s3_server.py"


class Server:
    """The running server: where it is, and what it shall do wrong."""

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
            return json.load(answer)


@contextmanager
def running_server():
    """Yield a server with an empty bucket named ``bucket``."""
    command = [sys.executable, str(SERVER)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield Server(endpoint)
        process.kill()
