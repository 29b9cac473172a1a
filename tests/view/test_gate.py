"""Tests of movekd.view.gate: which requests reach the server, with which arguments."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.view.gate import MAX_IMAGE_BYTES, Gate

JOIN = "/gradio_api/queue/join"


class Behind:
    """The server behind the gate: records what reaches it, and answers 200."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.body = b""

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        if scope["method"] == "POST":
            self.body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def ask(method, path, body=b"", listens="127.0.0.1", query=b"", kind="http", **headers):
    """Return status of a request, and the server behind the gate."""
    behind, sent = Behind(), []
    parts = [body[at : at + 2**20] for at in range(0, len(body), 2**20)] or [b""]
    received = [{"type": "http.request", "body": p, "more_body": True} for p in parts]
    received[-1]["more_body"] = False

    async def receive():
        return received.pop(0)

    async def send(message):
        sent.append(message)

    headers = {"host": "127.0.0.1:7860"} | headers
    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "query_string": query,
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
    }
    asyncio.run(Gate(behind, listens)(scope, receive, send))
    return sent[0].get("status", sent[0]["type"]), behind


def call(data, **keys):
    return json.dumps({"data": data, "fn_index": 1, "session_hash": "a1", **keys}).encode()


FILE = {"path": "http://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def holds_an_object(value):
    if isinstance(value, dict):
        return True
    return isinstance(value, list) and any(map(holds_an_object, value))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(VALUES | st.just(FILE), max_size=6), VALUES)
def test_arguments_are_text_numbers_and_lists_of_them(data, more):
    status, behind = ask("POST", JOIN, call(data, event_data=more, api_name="x", simple_format=1))
    is_plain = not any(map(holds_an_object, data))
    is_flat = not any(isinstance(part, list) for v in data if isinstance(v, list) for part in v)
    assert status == (200 if is_plain and is_flat else 422)
    if status == 200:
        found = json.loads(behind.body)
        assert set(found) == {"data", "fn_index", "session_hash", "trigger_id"}
        assert found["data"] == data
        headers = dict(behind.scopes[0]["headers"])
        assert headers[b"content-length"] == str(len(behind.body)).encode()
    else:
        assert behind.scopes == []


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"[1]", b"\xff", b'{"data": ' + b"[" * 3000),
        call(["x"] * 9),
        call([], session_hash="../a"),
        call([], fn_index="1"),
        b'{"data": [NaN], "fn_index": 1, "session_hash": "a1"}',
        b"--x\r\ncontent-disposition: form-data\r\n\r\n",
    ],
)
def test_a_body_that_is_no_call_is_refused(body):
    status, behind = ask("POST", JOIN, body)
    assert (status, behind.scopes) == (422, [])


def test_a_picture_has_a_limit():
    assert ask("POST", JOIN, call(["A" * (MAX_IMAGE_BYTES * 4 // 3)]))[0] == 200
    status, behind = ask("POST", JOIN, b" " * (2 * MAX_IMAGE_BYTES))
    assert (status, behind.scopes) == (413, [])


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize(
    "path",
    [
        *(
            "/gradio_api/upload",
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/proxy=http://a.example",
        ),
        *(
            "/static/../secret",
            "/static/.hidden",
            "/static/",
            "/assets/a/../../b",
            "//",
            "/static/a\n",
        ),
        *("/gradio_api/call/reply", "/gradio_api/run/reply", "/gradio_api/component_server"),
        *("/gradio_api/heartbeat/../../x", "/gradio_api/queue/join/", "/login", "/new-of-gradio"),
    ],
)
def test_what_is_not_named_is_closed(method, path):
    status, behind = ask(method, path, call([]))
    assert (status, behind.scopes) == (404, [])


@pytest.mark.parametrize(
    ("listens", "host", "is_allowed"),
    [
        ("127.0.0.1", "127.0.0.1:7860", True),
        ("127.0.0.1", "localhost:7860", True),
        ("127.0.0.1", "[::1]:7860", True),
        ("127.0.0.1", "site.example:7860", False),
        ("127.0.0.1", "192.0.2.7:7860", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[", False),
        ("127.0.0.1", "localhost.site.example", False),
        ("127.0.0.1", "127.0.0.1@site.example", False),
        ("0.0.0.0", "192.0.2.7:7860", True),
        ("0.0.0.0", "site.example", False),
        ("gpu1.lab", "gpu1.lab:7860", True),
        ("gpu1.lab", "GPU1.lab:7860", True),
    ],
)
def test_a_site_whose_name_points_here_is_refused(listens, host, is_allowed):
    status, _ = ask("GET", "/", listens=listens, host=host)
    assert status == (200 if is_allowed else 400)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:7860", 200),
        ("http://127.0.0.1:7861", 403),
        ("http://site.example", 403),
        ("null", 403),
    ],
)
def test_other_sites_may_not_call(origin, status):
    assert ask("POST", JOIN, call([]), origin=origin)[0] == status
    assert ask("GET", "/config", origin=origin)[0] == status


def test_stored_states_are_not_named_by_a_query():
    _, behind = ask("GET", "/", query=b"deep_link=x&page=y")
    assert behind.scopes[0]["query_string"] == b""
    _, behind = ask("GET", "/gradio_api/queue/data", query=b"session_hash=a1")
    assert behind.scopes[0]["query_string"] == b"session_hash=a1"


def test_a_websocket_is_closed():
    assert ask("GET", "/", kind="websocket")[0] == "websocket.close"
