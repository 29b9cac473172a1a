"""Tests of movekd.student.export.output_folder: whole or nothing, and whose files are deleted."""

import os
import resource
import shutil
import sys
from itertools import count

import pytest
from safetensors.torch import save_file

from exports import export
from movekd.errors import ConfigError
from movekd.files.ownership import OWNERSHIP_FILE, changes, read_owned, write_owned
from movekd.student.export.output_folder import new_directory
from movekd.student.official.import_checkpoint import import_official


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(out, text, **keys):
    """Write a folder of two files."""
    with new_directory(out, "movekd export", **keys) as folder:
        (folder / "part").mkdir()
        (folder / "config.json").write_text(text)
        (folder / "part/weights").write_text(text * 1000)


def test_an_earlier_import_is_replaced_but_no_checkpoint_and_no_run(kit, tmp_path, snapshot):
    source = kit.write_released(tmp_path)
    save_file(kit.released_state(), source / "model.safetensors")
    with new_directory(tmp_path / "in", "movekd import") as directory:
        import_official(source, directory)
    with new_directory(tmp_path / "in", "movekd import", overwrite=True) as directory:
        (directory / "new").touch()
    assert names(tmp_path / "in") == [OWNERSHIP_FILE, "new"]
    kit.make_run(tmp_path / "run", kit.OFFICIAL)
    (tmp_path / "run/config.yaml").write_text("imported: {from: x}")  # as `train` writes one
    of_train = shutil.copytree(tmp_path / "run", tmp_path / "recorded")
    write_owned(of_train, ["config.yaml"], "movekd train")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("the only copy")
    before = snapshot(tmp_path)
    for place in (source, tmp_path / "run", precious, precious / "thesis.txt", of_train):
        for force in (False, True):
            refusal = pytest.raises(ConfigError, match=r"was not written by `movekd export`|an exp")
            with refusal, new_directory(place, "movekd import", overwrite=True, force=force):
                pass
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", ["changed", "added", "linked"])
def test_files_of_others_stay_until_force_is_given(tmp_path, snapshot, what):
    out = tmp_path / "out"
    write(out, "one")
    if what == "changed":
        (out / "config.json").write_text("mine")
    elif what == "added":
        (out / "part/notes.txt").write_text("mine")
    else:
        (out / "config.json").rename(tmp_path / "elsewhere")
        (out / "config.json").symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    name = "notes.txt" if what == "added" else "config.json"
    with pytest.raises(ConfigError, match=rf"holds 1 files that movekd did not.*{name}.*--force"):
        write(out, "two", overwrite=True)
    with pytest.raises(ConfigError, match="give --overwrite"):
        write(out, "two", force=True)
    assert snapshot(tmp_path) == before
    write(out, "two", overwrite=True, force=True)
    assert names(out) == [OWNERSHIP_FILE, "config.json", "part"]
    assert names(out / "part") == ["weights"]


def test_an_export_without_a_record_asks_for_force(kit, tmp_path):
    out = tmp_path / "out"
    trained = kit.make_run(tmp_path / "run", None)
    export(trained, "encoder", out)
    (out / OWNERSHIP_FILE).unlink()  # as earlier versions left it
    with pytest.raises(ConfigError, match=r"has no record .*--overwrite --force"):
        export(trained, "encoder", out, overwrite=True)
    export(trained, "encoder", out, overwrite=True, force=True)
    owned = read_owned(out)
    assert owned is not None
    assert owned.made_by == "movekd export"
    assert changes(out, owned) == {}
    assert {*owned.files, OWNERSHIP_FILE} == {path.name for path in out.iterdir()}


@pytest.mark.parametrize("kind", ["hf", "encoder", "official"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(kit, tmp_path, kind, official):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # less than the weights
    try:
        with pytest.raises(ConfigError, match=r"was not written: .*(too large|writing file).*room"):
            export(official, kind, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_another_command_that_writes_the_folder_is_named(tmp_path):
    with new_directory(tmp_path / "out", "movekd export") as folder:
        (folder / "config.json").touch()
        with pytest.raises(ConfigError, match=rf"another command \(pid {os.getpid()} on "):
            write(tmp_path / "out", "two")
    assert names(tmp_path / "out") == [OWNERSHIP_FILE, "config.json"]


def test_a_folder_of_the_workspaces_name_is_not_deleted(tmp_path):
    (tmp_path / ".out.movekd").mkdir()
    (tmp_path / ".out.movekd/thesis.txt").write_text("the only copy")
    with pytest.raises(ConfigError, match=r"\.out\.movekd was not made by movekd"):
        write(tmp_path / "out", "two")
    assert (tmp_path / ".out.movekd/thesis.txt").read_text() == "the only copy"


EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def killed(operation, number):
    """Run a function in a child that dies before its file operation ``number``; return whether."""
    child = os.fork()
    if child == 0:
        counted = count(1)

        def hook(event, _):
            if event in EVENTS and next(counted) == number:
                os._exit(9)

        sys.addaudithook(hook)
        operation()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(
    ("had", "start", "step"),
    [
        ("one", 2, 6),
        pytest.param("one", 1, 1, marks=pytest.mark.slow),
        pytest.param(None, 1, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_file_operation_it_is_old_or_new_and_runs_again(tmp_path, had, start, step):
    for number in count(start, step):
        folder = tmp_path / str(number)
        out = folder / "out"
        folder.mkdir()
        if had:
            write(out, had)
        was_killed = killed(lambda out=out: write(out, "two", overwrite=True), number)
        if out.exists():
            assert (out / "config.json").read_text() in (had, "two")
            owned = read_owned(out)
            assert owned is not None
            assert changes(out, owned) == {}
        write(out, "three", overwrite=True)
        assert (out / "config.json").read_text() == "three"
        assert names(folder) == ["out"]
        if not was_killed:
            break
    assert number > 10
