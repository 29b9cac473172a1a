"""What `movekd doctor` finds on this machine."""

from importlib import metadata

import pytest

from movekd.cache.spec import load_spec, shipped_specs
from movekd.cache.storage import open_storage
from movekd.teachers.providers import find_downloaded, published
from movekd.view import doctor


@pytest.fixture(autouse=True)
def _no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("movekd.analysis.disk_benchmark._SECONDS", 0.0)


def test_what_is_installed_fits(tmp_path):
    found = doctor.examine(open_storage(tmp_path / "cache"))
    assert found.problems == []
    versions = {package.name: package.version for package in found.packages}
    assert versions["torch"] == metadata.version("torch")
    assert {package.extra for package in found.packages} >= {"", "ray", "web", "s3"}
    assert "dev" not in {package.extra for package in found.packages}
    assert found.devices[-1].name == "cpu"
    assert found.disk.write_bytes_per_s > 0
    assert not (tmp_path / "cache").exists()  # nothing is left behind


def test_what_does_not_fit_is_a_sentence(tmp_path, monkeypatch):
    needed = ["torch>=99", "not-there-at-all>=1", "nor-this; extra == 'web'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needed)
    found = doctor.examine(open_storage(tmp_path / "cache"), is_disk_measured=False)
    assert len(found.problems) == 2
    assert "pip install 'torch>=99'" in found.problems[0]
    assert "not-there-at-all is missing" in found.problems[1]


@pytest.mark.parametrize("name", shipped_specs())
def test_every_shipped_teacher_says_where_its_weights_are(name):
    place = published(load_spec(name))
    assert place.repo.count("/") == 1
    assert all(file.endswith((".safetensors", ".json", ".bin", ".pth")) for file in place.files)


def test_downloaded_weights_are_found(tmp_path):
    spec = load_spec("clip")
    assert find_downloaded(spec) is None
    repo = tmp_path / "hub" / "models--openai--clip-vit-large-patch14-336"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    file = repo / "snapshots" / "abc" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert find_downloaded(spec) == file
