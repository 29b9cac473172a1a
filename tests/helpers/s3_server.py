"""Run an S3 server in its own process that fails on demand; ``s3`` starts it.

moto answers; in front of it stands a list of faults, set with POST /__faults__. One fault:
{"method": "GET", "match": "tokens", "kind": "500", "times": 2}. Kinds: 500 and 503 (SlowDown) are
answered instead of the request, 500-after is answered although it was carried out, truncated sends
half of the body. GET /__log__ returns the requests since the faults were last set.
"""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

StartResponse = Callable[..., Any]
FAULTS = {
    "500": ("500 Internal Server Error", "InternalError"),
    "500-after": ("500 Internal Server Error", "InternalError"),
    "503": ("503 Slow Down", "SlowDown"),
}


class Faulty:
    """WSGI application: moto behind the faults."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._faults: list[dict[str, Any]] = []
        self._log: list[str] = []

    def __call__(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/__faults__":
            length = int(environ["CONTENT_LENGTH"])
            self._faults, self._log = json.loads(environ["wsgi.input"].read(length)), []
            return self._answer(start, b"{}")
        if path == "/__log__":
            return self._answer(start, json.dumps(self._log).encode())
        asked = environ.get("HTTP_RANGE") or unquote(environ.get("QUERY_STRING", ""))
        self._log.append(f"{method} {path} {asked}".strip())
        fault = self._next_fault(method, path)
        if fault in ("500", "503"):
            body = self._fail(start, fault)
            return [] if method == "HEAD" else body
        if fault is None:
            return self._moto(environ, start)
        answer: list[Any] = []
        body = b"".join(self._moto(environ, lambda *given: answer.extend(given)))
        if fault == "500-after":
            return self._fail(start, fault)
        status, headers = answer[:2]
        if len(body) < 2:
            return self._fail(start, "500")
        others = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start(status, [*others, ("Content-Length", str(len(body)))])
        return [body[: len(body) // 2]]

    def _next_fault(self, method: str, path: str) -> str | None:
        for fault in self._faults:
            if fault["method"] == method and fault["match"] in path and fault["times"] > 0:
                fault["times"] -= 1
                return str(fault["kind"])
        return None

    def _fail(self, start: StartResponse, kind: str) -> Iterable[bytes]:
        status, code = FAULTS[kind]
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def _answer(self, start: StartResponse, body: bytes) -> Iterable[bytes]:
        start("200 OK", [("Content-Length", str(len(body)))])
        return [body]


class Quiet(WSGIRequestHandler):
    """Log no requests."""

    def log(self, *_: Any) -> None:
        """Print nothing."""


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Faulty(), threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()
    sys.exit(0)
