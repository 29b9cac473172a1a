"""Nothing that a browser sends opens a connection or a path: every route of Gradio, hostile values.

The server runs under an audit hook, which sees name look-ups, connects, opened files and started
programs, whatever library does them.
"""

import http.client
import itertools
import json
import re
import sys
import sysconfig
from contextlib import closing
from pathlib import Path

import pytest

import movekd
from web_page import serve

pytestmark = pytest.mark.web

HELPER = Path(__file__).parents[1] / "helpers" / "audited_view.py"
OPEN = {
    *("/", "/config", "/config/", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"),
    *("/static/{path:path}", "/assets/{path:path}", "/svelte/{path:path}"),
    *("/gradio_api/info", "/gradio_api/info/", "/gradio_api/startup-events"),
    *("/gradio_api/theme.css", "/gradio_api/queue/data", "/gradio_api/queue/join"),
    "/gradio_api/heartbeat/{session_hash}",
}
"""What the page needs."""
CLOSED = {
    # who is logged in, and the app's id: the page has no login
    *("/login", "/login/", "/logout", "/gradio_api/user", "/gradio_api/user/"),
    *("/gradio_api/login_check", "/gradio_api/login_check/", "/gradio_api/token"),
    *("/gradio_api/token/", "/gradio_api/app_id", "/gradio_api/app_id/"),
    # take paths or addresses
    *("/gradio_api/file={path_or_url:path}", "/gradio_api/file/{path:path}"),
    *("/gradio_api/proxy={url_path:path}", "/gradio_api/upload", "/gradio_api/upload_progress"),
    "/gradio_api/custom_component/{id}/{environment}/{type}/{file_name}",
    *("/gradio_api/component_server", "/gradio_api/component_server/"),
    "/gradio_api/process_recording",
    # store the page's values in files
    "/gradio_api/deep_link",
    *("/gradio_api/runs", "/gradio_api/runs/", "/gradio_api/run-history/connect"),
    *("/gradio_api/run-history/buckets", "/gradio_api/run-history/records"),
    "/gradio_api/run-history/records/{endpoint}/{record_id}/assets/{asset_id}",
    # streams of audio and video
    *("/gradio_api/stream/{event_id}", "/gradio_api/stream/{event_id}/close"),
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file",
    # calls by programs, beside the page's queue
    *("/gradio_api/run/{api_name}", "/gradio_api/run/{api_name}/", "/gradio_api/api/{api_name}"),
    *("/gradio_api/api/{api_name}/", "/gradio_api/call/{api_name}", "/gradio_api/call/{api_name}/"),
    *("/gradio_api/call/v2/{api_name}", "/gradio_api/call/v2/{api_name}/"),
    *("/gradio_api/call/{api_name}/{event_id}", "/gradio_api/call/v2/{api_name}/{event_id}"),
    *("/gradio_api/queue/status", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/reset/"),
    *("/openapi.json", "/gradio_api/openapi.json"),
    # for developers
    *("/gradio_api/dev/reload", "/gradio_api/vibe-edit", "/gradio_api/vibe-edit/"),
    *("/gradio_api/undo-vibe-edit", "/gradio_api/undo-vibe-edit/", "/gradio_api/vibe-code"),
    *("/gradio_api/vibe-code/", "/gradio_api/vibe-starter-queries"),
    "/gradio_api/vibe-starter-queries/",
    *("/monitoring", "/monitoring/summary", "/monitoring/{key}"),
    *("/gradio_api/profiling/traces", "/gradio_api/profiling/summary"),
    "/gradio_api/profiling/clear",
    *("/pwa_icon", "/pwa_icon/{size}"),
}
"""What it does not need. A route of a later Gradio is in neither: decide, then write it down."""


@pytest.fixture(scope="module")
def secret(tmp_path_factory, world):
    """An image outside of every folder that the page is given."""
    path = tmp_path_factory.mktemp("outside") / "secret.png"
    path.write_bytes(next((world / "source" / "images").glob("*.png")).read_bytes())
    return path


def files(secret):
    """Return values that Gradio takes for files, and values that contain one."""
    hosts = "http://hostile.example/x.png", "https://192.0.2.1/x.png", "http://[::1]:9/x.png"
    for place in (
        *hosts,
        str(secret),
        "/proc/self/environ",
        "../../../etc/passwd",
        "file:///etc/hosts",
    ):
        for keys in ({"path": place}, {"path": "x.png", "url": place}, {"url": place}):
            yield keys | {"meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}


def request(port, method, path, body=None, **headers):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        if "event-stream" in answer.getheader("content-type", ""):
            return answer.status, ""
        return answer.status, answer.read()


def call(port, function, data, path="/gradio_api/queue/join"):
    """Call a function of the page as the page does; return the status and the last event."""
    session = "a1b2c3"
    body = {"data": data, "fn_index": function, "session_hash": session, "trigger_id": 1}
    status, text = request(
        port, "POST", path, json.dumps(body), **{"Content-Type": "application/json"}
    )
    if status != 200:
        return status, text
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        for line in connection.getresponse():
            if b"process_completed" in line or b"unexpected_error" in line:
                return status, line
    return status, b""


def events(log):
    """Return what the server did, without what a Python program reads of itself."""
    inside = (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), "/usr/", "/proc/self/maps")
    inside += (
        str(Path(movekd.__file__).parents[1]),
        "/etc/mime.types",
        "/etc/httpd",
        "/etc/apache",
    )
    found = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        (event, args)
        for event, args in found
        if not (event in ("open", "os.listdir", "os.scandir") and args[0].startswith(inside))
        and not (event == "open" and args[0].isdecimal())
    ]


def outside(log, *allowed):
    return [(e, a) for e, a in events(log) if not (a and a[0].startswith(tuple(map(str, allowed))))]


def test_no_request_opens_a_connection_or_a_path(world, secret):
    log = world / "audit.jsonl"
    program = (str(HELPER), str(log), "gate")
    hostile = list(files(secret))
    with serve(world, "--shards", "data", "--run", "finetune", program=program) as served:
        port, installed = served.port, json.loads(Path(f"{log}.routes").read_text())
        routes, functions = installed["routes"], range(installed["functions"] + 2)
        assert not OPEN & CLOSED
        assert set(routes) - OPEN - CLOSED == set(), "decide about them, in gate.py and here"
        assert request(port, "GET", "/")[0] == 200
        places = [value.get("url") or value["path"] for value in hostile]
        for path, methods in routes.items():
            for place in dict.fromkeys(map(str, places)) if "{" in path else ("",):
                address = re.sub(r"\{.*?\}", lambda _, place=place: place, path)
                for method, query in itertools.product([*methods, "PUT"], ("", "?deep_link=x")):
                    body = json.dumps(hostile[0]) if method == "POST" else None
                    status, text = request(port, method, address.replace(" ", "") + query, body)
                    assert b"root:" not in text
                    if path in CLOSED:
                        assert status == 404, (method, address)
        for function, value in itertools.product(functions, hostile):
            for data in (
                [value],
                ["Is it?", value, "x"],
                ["Is it?", [value]],
                [None] * 3 + [value],
            ):
                assert call(port, function, data)[0] == 422
        form = (
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\nx\r\n--b--'
        )
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        assert request(port, "POST", "/gradio_api/upload", form, **kind)[0] == 404
        # as the page itself asks, with values that name files
        for text in (str(secret), "http://hostile.example/x.png", "../../etc/passwd"):
            for function in functions:
                for data in ([text], [text, [text], 0, text], [text, text, text, 0], []):
                    assert call(port, function, data)[0] in (200, 404, 422, 500)
    found = outside(log, world)
    assert found == []


def test_the_hook_sees_what_the_gate_prevents(world, secret):
    log = world / "control.jsonl"
    program = (str(HELPER), str(log), "no-gate")
    value = {"path": "http://hostile.example/x.png", "meta": {"_type": "gradio.FileData"}}
    with serve(world, "--shards", "data", program=program) as served:
        for function in range(4):
            call(served.port, function, [value, [], 0, "mean"])
    seen = outside(log, world)
    assert any(e == "socket.getaddrinfo" and "hostile.example" in a[0] for e, a in seen), seen
