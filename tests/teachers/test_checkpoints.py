"""Weights are found, read without running anything, and refused with the way out."""

import threading
from collections.abc import Callable
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from movekd.cache.spec import CacheSpec
from movekd.errors import WeightsError
from movekd.teachers.checkpoints import (
    Published,
    given_path,
    hub_answers,
    load_exactly,
    quiet,
    read_state_dict,
    weights_file,
)

Shrink = Callable[..., CacheSpec]
NOWHERE = Published(None, ("det/best.pth", "other.bin"))


def test_a_directory_yields_the_preferred_file_or_its_only_one(
    tmp_path: Path, shrunken: Shrink
) -> None:
    spec = shrunken("eva02", weights=str(tmp_path))
    with pytest.raises(WeightsError, match=r"should hold best\.pth .*found none"):
        weights_file(spec, NOWHERE)
    (tmp_path / "a.pth").touch()
    (tmp_path / "notes.txt").touch()
    assert weights_file(spec, NOWHERE).name == "a.pth"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(WeightsError, match=r"found a\.pth, b\.safetensors\. Set `weights`"):
        weights_file(spec, NOWHERE)
    for name in ("model.safetensors", "other.bin", "best.pth"):  # each is preferred to the last
        (tmp_path / name).touch()
        assert weights_file(spec, NOWHERE).name == name


def test_paths_that_cannot_hold_weights_are_refused(tmp_path: Path, shrunken: Shrink) -> None:
    with pytest.raises(WeightsError, match="nowhere does not exist; expected `hub`, a directory"):
        given_path(shrunken("eva02", weights=str(tmp_path / "nowhere")))
    (tmp_path / "weights.npz").touch()
    with pytest.raises(WeightsError, match=r"weights\.npz is none of \.safetensors"):
        given_path(shrunken("eva02", weights=str(tmp_path / "weights.npz")))


def test_what_is_not_published_is_not_fetched(shrunken: Shrink) -> None:
    with pytest.raises(WeightsError, match="no weights are published for movekd model"):
        weights_file(shrunken("eva02", weights="hub"), NOWHERE)


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_state_dicts_are_found_inside_training_checkpoints(key: str | None, tmp_path: Path) -> None:
    state = {"weight": torch.arange(3.0), "steps": torch.tensor(2)}
    torch.save({key: state, "epoch": 4} if key else {**state, "epoch": 4}, tmp_path / "a.pth")
    read = read_state_dict(tmp_path / "a.pth")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        "weight": [0, 1, 2],
        "steps": 2,
    }


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(WeightsError, match=rf"{name} is not a readable weights file"):
            read_state_dict(tmp_path / name)
    torch.save({"weight": Fraction(1, 2)}, tmp_path / "object.pth")  # would run code to be read
    with pytest.raises(WeightsError, match=r"object\.pth is not a readable weights file"):
        read_state_dict(tmp_path / "object.pth")
    for content in ({"epoch": 4}, [torch.ones(2)]):
        torch.save(content, tmp_path / "none.pth")
        with pytest.raises(WeightsError, match=r"none\.pth holds no tensors"):
            read_state_dict(tmp_path / "none.pth")


def test_dtypes_are_read_as_stored_and_loaded_as_the_module_s(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    state = {name: tensor.half() for name, tensor in module.state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    read = read_state_dict(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in read.values()} == {torch.float16}
    load_exactly(module, read, tmp_path)
    assert torch.equal(module.weight, state["weight"].float())
    assert module.weight.dtype == torch.float32


def test_refusal_names_the_first_keys_and_not_all(tmp_path: Path) -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(99)))
    with pytest.raises(WeightsError, match=r'Missing key.*"0\.weight", "0\.bias"') as caught:
        load_exactly(module, {}, tmp_path / "empty.pth")
    assert len(str(caught.value)) < 500


def test_quiet_leaves_the_libraries_as_they_were() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError, match="inside"), quiet():
        raise RuntimeError("inside")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_whether_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any answer counts, also an error; a closed port is known at once."""

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert hub_answers()
        server.shutdown()
        thread.join()
    assert not hub_answers()
