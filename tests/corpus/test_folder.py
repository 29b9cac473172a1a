"""Tests of movekd.corpus.folder, and of what packing a folder does with any file in it."""

import contextlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus_files import check_sums, picture
from movekd.corpus.folder import list_folder
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CorpusError

PICTURES = [picture(number, (4, 3), format) for number, format in enumerate(["PNG", "JPEG", "GIF"])]
CONTENTS = [*PICTURES, b"", b"words", PICTURES[1][:200], b"\0\0\0 ftypavif", b"{}"]

parts = st.sampled_from(["a", "b.png", "c.jfif", ".d", "e.json", "f.avif", "g\n.jpg", "h.i"])
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
things = st.one_of(
    st.tuples(st.just("file"), st.sampled_from(CONTENTS)),
    st.tuples(
        st.just("link"), st.sampled_from(["a", "../a", "nowhere", ".", "/dev/zero", "b.png"])
    ),
    st.tuples(st.just("fifo"), st.none()),
)


def make(folder, drawn):
    """Write what was drawn, as far as it fits into one tree; a first image is always in it."""
    (folder / "0.png").write_bytes(picture(9, (4, 3)))
    for path, (kind, content) in drawn.items():
        place = folder / path
        with contextlib.suppress(OSError):  # a file is where a folder should be, or the reverse
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(place) or not place.parent.resolve().is_relative_to(folder):
                continue
            if kind == "file":
                place.write_bytes(content)
            elif kind == "link":
                place.symlink_to(content)
            else:
                os.mkfifo(place)


def check_a_folder(folder, drawn):
    images = folder / "images"
    images.mkdir()
    make(images.resolve(), drawn)
    files, links = {}, set()  # what is there, found in the simplest way
    for parent, folders, names in os.walk(images):
        for name in [*names, *(f for f in folders if os.path.islink(os.path.join(parent, f)))]:
            path = os.path.join(parent, name)
            if os.path.isdir(path):
                links.add(os.path.relpath(path, images))
            else:
                data = Path(path).read_bytes() if os.path.isfile(path) else None
                files[os.path.relpath(path, images)] = data
    usable = {name: data for name, data in files.items() if data in [*PICTURES, picture(9, (4, 3))]}
    report = pack_folder(images, folder / "data", num_workers=1)
    written = check_sums(report, folder / "data")
    assert written["num_files_found"] == len(files) + len(links)
    corpus = open_corpus(folder / "data")
    assert corpus.names["name"].to_pylist() == sorted(usable)
    for name, data in usable.items():
        assert corpus.read_image(int(corpus.rows([name])[0])) == data
    dropped = [
        identity
        for kind in set(written["sums"]["files"]) - {"found", "kept"}
        for identity, _ in written[kind]
    ]
    assert sorted(dropped) == sorted({*files, *links} - set(usable))
    assert {identity for identity, _ in written["skipped_folders"]} == links


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.dictionaries(paths, things, max_size=8))
def test_every_file_of_any_folder_is_kept_or_listed(tmp_path_factory, drawn):
    check_a_folder(tmp_path_factory.mktemp("folder"), drawn)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(paths, things, max_size=20))
def test_every_file_of_many_folders_is_kept_or_listed(tmp_path_factory, drawn):
    check_a_folder(tmp_path_factory.mktemp("folder"), drawn)


def test_special_files_are_not_waited_for(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a").write_bytes(PICTURES[0])
    os.mkfifo(images / "fifo.png")
    (images / "device.png").symlink_to("/dev/zero")
    (images / "loop.png").symlink_to("loop.png")
    monkeypatch.chdir(images)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    report = pack_folder(images, tmp_path / "data")
    assert report.sums["files"] == {
        "found": 5,
        "kept": 1,
        "special_files": 3,
        "unreadable_images": 1,
    }
    assert report.num_dropped == 4


def test_a_corpus_in_the_folder_of_its_images_is_not_taken_for_them(tmp_path):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    for _ in range(2):
        report = pack_folder(tmp_path, tmp_path / "data")
        report.write(tmp_path / "data" / "report.json")
        assert report.sums["files"] == {"found": 1, "kept": 1}
    assert list_folder(tmp_path).files != list_folder(tmp_path, tmp_path / "data").files


@pytest.mark.slow
def test_a_deep_folder_is_listed(tmp_path):
    deep = tmp_path
    for _ in range(1100):  # deeper than Python's recursion
        deep = deep / "d"
        os.mkdir(deep)
    (deep / "0.png").touch()
    assert list_folder(tmp_path).files == ["d/" * 1100 + "0.png"]
    (deep / "0.png").unlink()
    while deep != tmp_path:  # pytest's own cleaning recurses
        deep.rmdir()
        deep = deep.parent


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="is no folder"):
        pack_folder(tmp_path / "none", tmp_path / "data")
