"""What the page gives away: nothing but the page, and to this machine alone."""

import http.client
import json
import socket
from contextlib import closing

import pytest

pytestmark = pytest.mark.web


def request(served, method, path, body=None, host=None):
    """Return status and text of an answer; the path goes out as it stands here."""
    headers = {} if body is None else {"Content-Type": "application/json"}
    headers |= {} if host is None else {"Host": host}
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


def test_it_listens_to_this_machine_alone(served):
    with socket.create_connection(("127.0.0.1", served.port)):
        pass
    with pytest.raises(ConnectionRefusedError):  # another address of the same machine
        socket.create_connection(("127.0.0.2", served.port))


def test_it_answers_to_names_of_this_machine_alone(served):
    """A site in the same browser may let its own name point here."""
    for path in ("/", "/config", "/gradio_api/info"):
        assert request(served, "GET", path, host=f"localhost:{served.port}")[0] == 200
        status, text = request(served, "GET", path, host=f"elsewhere.example:{served.port}")
        assert status == 400
        assert text.startswith("Invalid host header. Open the page by")


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=%2Fetc%2Fpasswd",
        "gradio_api/file=../../../../../../etc/passwd",
        "gradio_api/file=cache/cache.json",
        "gradio_api/file={world}/cache/cache.json",
        "gradio_api/file={world}/finetune/config.yaml",
        "gradio_api/file=http://127.0.0.1:{port}/config",
        "gradio_api/proxy=http://127.0.0.1:{port}/config",
        "file=/etc/passwd",
        "static/../../../../../../../../etc/passwd",
        "assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
    ],
)
def test_no_file_is_served(served, world, path):
    status, text = request(served, "GET", "/" + path.format(world=world, port=served.port))
    assert status in (400, 403, 404)
    assert "root:" not in text


def test_a_program_is_no_browser(served, world):
    """A path as the page once sent an uploaded image, to the routes for programs: closed."""
    image = str(next((world / "source" / "images").glob("*.png")))
    given = {"path": image, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": ["Is there a 3?", given, "pretrain_00002.png", 0]})
    for route in ("call/reply", "run/reply", "api/reply", "call/v2/reply"):
        assert request(served, "POST", f"/gradio_api/{route}", body)[0] == 404


def test_no_call_is_kept_in_the_browser(served):
    config = json.loads(request(served, "GET", "/config")[1])
    assert not config["run_history"]
    assert not config["analytics_enabled"]
