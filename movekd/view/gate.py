"""Let through what the page needs of Gradio's server, and nothing else.

Input: the requests of a browser. Output: the allowed ones, the rest refused. Gradio serves many
routes that take paths and addresses (``file=``, ``proxy=``, uploads, streams), and opens them for
any function whose arguments look like a file. The page needs none of this: its arguments are text,
numbers and lists of them, also the picture that somebody asks about.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_IMAGE_BYTES = 16 * 2**20
"""Largest image file that the page sends."""
_MAX_BODY_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 64 * 2**10  # base64, and the rest of the call
_MAX_BODIES = 4
_BODY_TIMEOUT_S = 60

_JOIN = "/gradio_api/queue/join"
_FILE = r"(?!\.)[\w.@+-]+"  # a name that neither climbs nor hides
_OPEN = {
    "GET": (
        r"/|/config/?|/theme\.css|/gradio_api/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json"
        rf"|/(static|assets|svelte)(/{_FILE})+"
        r"|/gradio_api/(info/?|startup-events|queue/data|heartbeat/[a-z0-9]{1,64})"
    ),
    "HEAD": r"/",
    "POST": _JOIN,
}
"""The open routes; everything else is 404."""

_Scalar = StrictStr | StrictBool | StrictInt | StrictFloat | None


class _Call(BaseModel):
    """A call of one of the page's functions. Other keys are dropped."""

    model_config = ConfigDict(allow_inf_nan=False)

    data: Annotated[list[_Scalar | list[_Scalar]], Field(max_length=8)]
    fn_index: StrictInt
    session_hash: Annotated[str, Field(pattern=r"^[a-z0-9]{1,64}$")]
    trigger_id: StrictInt | None = None


class Gate:
    """ASGI middleware that refuses all requests but the page's own.

    Args:
        app: the server behind it.
        host: address that the server listens on.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._is_local = app, is_loopback(host)
        self._names = {host.lower(), "localhost"}
        if not self._is_local:
            self._names.add(socket.gethostname().lower())
        self._num_bodies = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = self.refusal(scope["method"], scope["path"], Headers(scope=scope))
        if answer is None:
            scope = dict(scope)
            if scope["path"] != "/gradio_api/queue/data":
                scope["query_string"] = b""  # names pages and stored states that this page lacks
            if scope["method"] == "POST":
                answer, receive = await self._check_body(scope, receive)
        if answer is not None:
            status, text = answer
            await PlainTextResponse(text, status)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """Return status and text for a request that is refused by its head; None for the others."""
        host = headers.get("host", "")
        if not self._is_allowed_host(host):
            return 400, (
                "Invalid host header. Open the page by the machine's address, or start it with "
                "this name as --host."
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "Requests of other sites are refused."
        if re.fullmatch(_OPEN.get(method, r"(?!)"), path, re.ASCII) is None:
            return 404, "The page has no such address."
        return None

    def _is_allowed_host(self, host: str) -> bool:
        """Return whether a Host header names this server, and not a site that points here.

        A site can let its own name resolve to this machine (DNS rebinding), but no address.
        """
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_local

    async def _check_body(
        self, scope: Scope, receive: Receive
    ) -> tuple[tuple[int, str] | None, Receive]:
        """Return a refusal or None, and a ``receive`` that gives the checked body."""
        if self._num_bodies >= _MAX_BODIES:
            return (503, "Too many requests at a time; try again."), receive
        self._num_bodies += 1
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await _read_body(receive)
        except TimeoutError:
            return (408, "The request took too long."), receive
        finally:
            self._num_bodies -= 1
        if body is None:
            limit = f"{MAX_IMAGE_BYTES // 2**20} MiB"
            return (413, f"The request is too large; an image may have {limit}."), receive
        try:
            checked = _Call.model_validate_json(body).model_dump_json().encode()
        except ValidationError:
            return (422, "Expected a call of the page: text, numbers and lists of them."), receive
        length = (b"content-length", str(len(checked)).encode())
        kept = [
            (k, v) for k, v in scope["headers"] if k not in (b"content-length", b"content-type")
        ]
        scope["headers"] = [*kept, (b"content-type", b"application/json"), length]
        return None, _replay(checked, receive)


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    return host == "localhost" or host.startswith("127.") or host == "::1"


async def _read_body(receive: Receive) -> bytes | None:
    """Return the body of a request, or None if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives a body, then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
