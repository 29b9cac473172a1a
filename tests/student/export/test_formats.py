"""Tests of movekd.student.export.formats: an export is complete, or what was there stays."""

import shutil

import pytest

from exports import export
from movekd.errors import ConfigError
from movekd.student.checkpoint import load_student
from movekd.student.export.output_folder import new_directory


@pytest.fixture(scope="module")
def trained(kit, tmp_path_factory):
    return kit.make_run(tmp_path_factory.mktemp("run"), kit.OFFICIAL)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["hf", "encoder", "official"])
def test_an_earlier_export_is_replaced_when_asked(trained, tmp_path, kind):
    out = tmp_path / "out"
    export(trained, kind, out)
    (out / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="exists already; give --overwrite"):
        export(trained, kind, out)
    assert (out / "config.json").read_text() == "{}"
    with pytest.raises(ConfigError), new_directory(out, "", overwrite=True, force=True):
        export(trained, kind, out)  # fails half way
    with pytest.raises(ConfigError, match=r"changed since \(config\.json\).*--force"):
        export(trained, kind, out, overwrite=True)
    assert (out / "config.json").read_text() == "{}"
    export(trained, "encoder", out, overwrite=True, force=True)
    assert "movekd_clip_vision" in (out / "config.json").read_text()
    assert names(tmp_path) == ["out"]


def test_what_is_read_is_never_written_over(kit, tmp_path, monkeypatch, snapshot):
    kit.make_run(tmp_path / "runs/one", kit.OFFICIAL)
    base = shutil.copytree(kit.WEIGHTS / "clip", tmp_path / "base")
    trained = load_student(tmp_path / "runs/one")
    trained.run["student"]["vision_tower"] = str(base)
    export(trained, "hf", tmp_path / "hf")
    (base / "movekd.json").write_text('{"format": 1}')  # an encoder that was exported, for one
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path / "runs/one/model")
    for out in (
        *(tmp_path / "runs/one", tmp_path / "runs/one/model", tmp_path / "runs"),
        *(tmp_path / "runs/one/hf", tmp_path / "hf/../runs/one", base, base / "encoder"),
    ):
        with pytest.raises(ConfigError, match=r"which is read; .*Give another --output"):
            export(trained, "encoder", out, overwrite=True, source=tmp_path / "runs/one")
    with pytest.raises(ConfigError, match="which is read"):
        export(trained, "encoder", tmp_path / "runs/one/model/x")
    with pytest.raises(ConfigError, match="which is read"):
        export(load_student(tmp_path / "hf"), "hf", tmp_path / "hf", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs/one")
    with pytest.raises(ConfigError, match="which is read"):
        export(trained, "encoder", tmp_path / "link", overwrite=True, source=tmp_path / "runs/one")
    (tmp_path / "link").unlink()
    assert snapshot(tmp_path) == before
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    export(trained, "encoder", tmp_path / "new" / ".." / "new")
    assert "README.md" in names(tmp_path / "new")
