"""A CSV file lists labelled images: found = used + reasons, and nothing leads out of its folder."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow.csv import write_csv

from movekd.errors import CorpusError
from movekd.evaluate.encoder.labelled_images import read_labelled_images


def _quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("listed")
    for split in ("train", "test"):
        for at, name in enumerate(("cat", "dog, big")):
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = np.full((8, 8, 3), 40 * at + 10 * index + (split == "test"), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def _rows(folder: Path) -> list[tuple[str, str, str]]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    return [(name, name.split("/")[1], name.split("/")[0]) for name in names]


def _write(folder: Path, rows: list[tuple[str, ...]], name: str) -> Path:
    columns = dict(zip(("file_name", "label", "split"), zip(*rows, strict=True), strict=True))
    write_csv(pa.table(columns | {"width": [8] * len(rows)}), folder / name)
    return folder / name


def test_a_list_gives_what_the_folder_gives(folder: Path) -> None:
    listed = read_labelled_images(_write(folder, _rows(folder), "all.csv"), _quiet)
    (folder / "all.csv").unlink()
    found = read_labelled_images(folder, _quiet)
    assert (listed.train, listed.test) == (found.train, found.test)
    assert listed.classes == found.classes == ["cat", "dog, big"]
    assert listed.num_found == found.num_found == 12


def test_every_row_is_used_or_has_a_reason(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes((folder / "train/cat/0.png").read_bytes())
    bad = [
        ("train/cat/0.png", "dog, big", "train"),
        ("train/cat/none.png", "cat", "train"),
        ("test/cat/0.PNG", "cat", "validation"),
        ("", "cat", "train"),
        (str(tmp_path / "outside.png"), "cat", "train"),
    ]
    found = read_labelled_images(_write(folder, _rows(folder) + bad, "bad.csv"), _quiet)
    assert found.num_found == 17 == len(found.train) + len(found.test) + len(found.skipped)
    said = " ".join(f"{name}: {reason}" for name, reason in found.skipped.items())
    for part in (
        "line 14): an earlier line lists it",
        "none.png",
        "split is 'validation'; expected train or test",
        "file_name or label is empty",
        "leads out of",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label,split\na.png,cat,train\n", "expected file_name among them once"),
        ("file_name,label,label,split\n", "expected label among them once"),
        ("", "expected file_name among them once"),
        (
            'file_name,label,split\n"a.png,cat,train\n',
            "is no CSV file that can be read, near line 2",
        ),
        ("file_name,label,split\na.png,cat\n", "another number of fields"),
        ("file_name,label,split\na.png,cat,train,9\n", "another number of fields"),
        ("file_name,label,split\na.png,cat,test\n", "has the label cat in test, but not in train"),
        ("\ufefffile_name,label,split\nno.png,cat,train\n", "no.png: image 'no.png' cannot be"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(CorpusError, match=message):
        read_labelled_images(tmp_path / "list.csv", _quiet)
    (tmp_path / "list.csv").write_bytes(b"file_name,label,split\n\xff,cat,train\n")
    with pytest.raises(CorpusError, match="no UTF-8 text"):
        read_labelled_images(tmp_path / "list.csv", _quiet)


def test_where_no_image_can_be_read_the_first_reason_is_said(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "a.png").write_text("no image")
    (tmp_path / "LICENSE").write_text("a file beside the splits")
    with pytest.raises(CorpusError, match=r"3 are not used, the first is test/cat/a\.png: "):
        read_labelled_images(tmp_path, _quiet)
