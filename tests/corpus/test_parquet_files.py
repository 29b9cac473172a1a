"""Tests of movekd.corpus.parquet_files."""

import os

import pytest

from movekd.corpus.parquet_files import list_parquet
from movekd.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    """A data set in the hub's layout, with files and a link beside it."""
    for name in ("ai2d/0.parquet", "ai2d/1.PARQUET", "chart(qa)/0.parquet", "README.md", "ai2d/x"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "set" / "linked").symlink_to(tmp_path)
    return tmp_path / "set"


ALL = ["ai2d/0.parquet", "ai2d/1.PARQUET", "chart(qa)/0.parquet"]


@pytest.mark.parametrize(
    "sources",
    [
        [""],
        ["", "ai2d", "ai2d/0.parquet"],  # each file counts once
        ["*"],
        ["ai2d", "*/*.parquet"],
        ["ai2d/*.*", "chart(qa)/0.parquet"],
    ],
)
def test_files_folders_and_globs_name_files_in_order(folder, sources):
    found = list_parquet([str(folder / source) for source in sources])
    assert list(found.paths) == ALL
    assert all(path == folder / label for label, path in found.paths.items())


def test_the_order_given_counts_and_labels_begin_at_the_common_folder(folder, monkeypatch):
    found = list_parquet([str(folder / ALL[2]), str(folder / ALL[0])])
    assert list(found.paths) == [ALL[2], ALL[0]]
    monkeypatch.chdir(folder)
    assert list(list_parquet(["chart(qa)", "ai2d"]).paths) == [ALL[2], *ALL[:2]]
    assert list(list_parquet([ALL[0]]).paths) == ["0.parquet"]
    (folder / "ai2d" / "0.bin").touch()
    assert list(list_parquet(["ai2d/0.bin"]).paths) == ["0.bin"]  # a file that is named is meant


def test_what_else_lies_in_a_folder_is_listed_once(folder):
    found = list_parquet([str(folder), str(folder)])
    assert [(label, kind) for label, kind, _ in found.left_out] == [
        ("README.md", "unused_files"),
        ("ai2d/x", "unused_files"),
        ("linked", "skipped_folders"),
    ]


def test_a_corpus_in_the_folder_is_not_its_own_source(folder):
    for name in ("index.parquet", "names.parquet"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / name).touch()
    assert list(list_parquet([str(folder)], ours=folder / "data").paths) == ALL
    assert len(list_parquet([str(folder)]).paths) == 5


def test_what_names_nothing_is_refused(folder):
    (folder / "empty").mkdir()
    for source in ("none.parquet", "*/none*", "empty", "*.md"):
        with pytest.raises(ConfigError, match=r"names no \.parquet file; expected .*Correct"):
            list_parquet([str(folder), str(folder / source)])
    os.rename(os.fsencode(folder / ALL[0]), os.fsencode(folder) + b"/\xff.parquet")
    with pytest.raises(ConfigError, match=r"is not Unicode.*another name"):
        list_parquet([str(folder)])
