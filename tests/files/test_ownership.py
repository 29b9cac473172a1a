"""Only what is provably ours is deleted."""

import os
from pathlib import Path

import pytest

from movekd.errors import ConfigError
from movekd.files.ownership import OWNERSHIP_FILE, changes, delete_owned, read_owned, write_owned

NAMES = ("a.tar", "model/weights", "model/base/b")


def make(folder: Path) -> None:
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    write_owned(folder, NAMES, "movekd test")


def test_what_is_as_recorded_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    owned = read_owned(tmp_path)
    assert owned is not None
    assert not changes(tmp_path, owned)
    assert delete_owned(tmp_path, owned) == {}
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == [
        "model/notes.txt"
    ]
    assert read_owned(tmp_path) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda path: path.write_text("other"), "of another size"),
        (lambda path: path.write_text(path.read_text()[::-1]), "of other content"),
        (lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to("x")), "no regular"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_a_changed_file_stays_and_is_named(tmp_path: Path, name: str, change, found: str) -> None:
    make(tmp_path)
    change(tmp_path / name)
    owned = read_owned(tmp_path)
    assert owned is not None
    assert list(changes(tmp_path, owned)) == [name]
    assert changes(tmp_path, owned)[name].startswith(found)
    left = delete_owned(tmp_path, owned)
    assert list(left) == ([] if found == "missing" else [name])
    assert os.path.lexists(tmp_path / name) == (found != "missing")


def test_a_linked_folder_leads_nowhere(tmp_path: Path) -> None:
    make(tmp_path / "run")
    (tmp_path / "run" / "model").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")
    owned = read_owned(tmp_path / "run")
    assert owned is not None
    assert set(delete_owned(tmp_path / "run", owned)) == {"model/weights", "model/base/b"}
    assert (tmp_path / "elsewhere" / "weights").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "a\0b", "."])
def test_a_record_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    owned = read_owned(tmp_path)
    assert owned is not None
    write_owned(tmp_path, {name: owned.files["a.tar"]}, "movekd test")
    with pytest.raises(ConfigError, match=r"is damaged.*Nothing is deleted"):
        read_owned(tmp_path)


def test_every_flipped_byte_of_a_record_is_seen(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / OWNERSHIP_FILE
    raw = path.read_bytes()
    before = read_owned(tmp_path)
    for at in range(0, len(raw), 7):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            assert read_owned(tmp_path) == before  # blanks between the values
        except ConfigError:
            continue
