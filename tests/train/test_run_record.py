"""Tests of movekd.train.run_record: one training per folder, and only its own files are deleted."""

import shutil
from pathlib import Path

import pytest

from movekd.errors import ConfigError
from movekd.files.lock import hold_lock, holder
from movekd.files.ownership import OWNERSHIP_FILE, read_owned, write_owned
from movekd.train.checkpoints import PARTIAL_DIR, numbered_checkpoints
from movekd.train.run_record import LOCK_FILE, delete_run, require_deletable, require_free

SHORT = ("training.max_steps=1", "training.save_strategy=steps", "training.save_steps=1")


@pytest.fixture(scope="module")
def ended(digits, tmp_path_factory):
    """A run of one step, with a checkpoint and TensorBoard's curves."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    digits.train(folder, "pretrain", *SHORT, "training.report_to=tensorboard")
    return folder


@pytest.fixture
def run(ended, tmp_path):
    shutil.copytree(ended, tmp_path / "run")
    return tmp_path / "run"


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {path.as_posix() for path in found}


def test_a_run_records_every_file_that_it_leaves(ended):
    recorded = set(read_owned(ended).files)
    for _, path in numbered_checkpoints(ended):
        recorded |= {f"{path.name}/{name}" for name in [*read_owned(path).files, OWNERSHIP_FILE]}
    assert files(ended) == recorded | {OWNERSHIP_FILE}
    assert not (ended / PARTIAL_DIR).exists()


def test_overwriting_deletes_all_of_that_and_nothing_else(run):
    mine = {"notes.txt", "model/notes.txt", "runs/notes.txt", "checkpoint-1/notes.txt", "models/x"}
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    require_deletable(run, force=False)
    assert delete_run(run, force=False) == sorted(mine)
    assert files(run) == mine | {OWNERSHIP_FILE}  # by which a repetition knows the folder
    assert read_owned(run).files == {}


def test_curves_that_grew_are_still_the_runs_own(run):
    (curves,) = run.glob("runs/*/events*")
    with curves.open("ab") as file:
        file.write(b"more")
    require_deletable(run, force=False)
    assert delete_run(run, force=False) == []


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "log.json",
        "model/mm_projector.safetensors",
        "model/tokenizer.json",
        "checkpoint-1/optimizer.pt",
        "runs",
    ],
)
def test_what_has_changed_is_not_deleted_without_force(run, snapshot, name):
    path = next(run.glob("runs/*/events*")) if name == "runs" else run / name
    raw = path.read_bytes()
    path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    before = snapshot(run)
    found = path.relative_to(run).as_posix()
    with pytest.raises(ConfigError, match=rf"would delete {found} in .*has changed.*--force"):
        require_deletable(run, force=False)
    assert snapshot(run) == before
    require_deletable(run, force=True)
    assert delete_run(run, force=True) == []


@pytest.mark.parametrize("name", ["model/vision_tower.safetensors", "checkpoint-7/trained.bin"])
def test_what_a_run_would_take_for_its_own_is_not_left_in_its_way(run, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("of a stranger")
    with pytest.raises(ConfigError, match=r"would delete (model/vision|checkpoint-7).*--force"):
        require_deletable(run, force=False)


def test_an_interrupted_deletion_can_be_repeated(run):
    (run / "model/mm_projector.safetensors").unlink()
    (run / "checkpoint-1/optimizer.pt").unlink()
    require_deletable(run, force=False)
    assert delete_run(run, force=False) == []


def test_a_run_of_an_older_version_is_deleted_only_with_force(run, snapshot):
    for path in (run, *(path for _, path in numbered_checkpoints(run))):
        (path / OWNERSHIP_FILE).unlink()
    (run / "notes.txt").write_text("mine")
    before = snapshot(run)
    with pytest.raises(ConfigError, match=r"no record .*older version.*Give --force to delete"):
        require_deletable(run, force=False)
    assert snapshot(run) == before
    require_deletable(run, force=True)
    assert delete_run(run, force=True) == ["notes.txt"]


def test_a_config_yaml_makes_no_run(tmp_path, snapshot):
    """Not even with --force: it is the name of everybody's settings."""
    for name in ("runs/a.txt", "model/weights.bin", "checkpoint-3/state"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("years of work")
    (tmp_path / "config.yaml").write_text("model: resnet50\ndata: imagenet\n")
    before = snapshot(tmp_path)
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"holds files but no config\.yaml of a run"):
            require_deletable(tmp_path, force=force)
    assert snapshot(tmp_path) == before


def test_what_another_command_wrote_is_no_run(tmp_path):
    (tmp_path / "00000.tar").write_text("images")
    write_owned(tmp_path, ["00000.tar"], "movekd shards pack")
    for check in (require_free, lambda path: require_deletable(path, force=False)):
        with pytest.raises(ConfigError, match=r"holds what `movekd shards pack` wrote"):
            check(tmp_path)


@pytest.mark.parametrize("name", ["inputs.json", "model/config.yaml", "checkpoint-4/state"])
def test_a_new_run_takes_no_strangers_files(digits, tmp_path, snapshot, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    before = snapshot(tmp_path)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"which a run would write itself"):
            digits.train(tmp_path, "pretrain", resume=resume)
    assert snapshot(tmp_path) == before


def test_a_link_in_place_of_a_folder_is_not_followed(run, tmp_path):
    (run / "model").rename(tmp_path / "elsewhere")
    (run / "model").symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="would delete model/"):
        require_deletable(run, force=False)
    delete_run(run, force=True)
    assert files(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_training_in_a_folder_is_refused(digits, run, snapshot, flags):
    before = snapshot(run)
    words = rf"is in use by another `movekd.*{holder()}"
    with hold_lock(run / LOCK_FILE, AssertionError), pytest.raises(ConfigError, match=words):
        digits.train(run, "pretrain", *SHORT, **flags)
    assert snapshot(run) == before


def test_a_refused_run_leaves_no_folder(digits, tmp_path):
    with pytest.raises(ConfigError, match="geometry"):
        digits.train(tmp_path / "run", "pretrain", "data.geometry=pad")
    assert not (tmp_path / "run").exists()
