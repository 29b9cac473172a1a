"""Tests of movekd.evaluate.image_folder: names of a stranger, the check before a model loads."""

import io
import os
import threading
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from movekd.errors import CorpusError
from movekd.evaluate.image_folder import check_images, list_problems, read_from_folder


def test_a_reader_never_leaves_its_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/a.png").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "images2").mkdir()
    (tmp_path / "images2/b").write_bytes(b"b")
    read = read_from_folder(folder)
    assert read("deep/a.png") == b"a"
    assert read("deep/../deep/a.png") == b"a"
    for name in (
        "../secret",
        "link",
        str(tmp_path / "secret"),
        "../images2/b",
        "deep/../../secret",
    ):
        with pytest.raises(CorpusError, match="leads out of"):
            read(name)
    for name in ("none.png", "deep"):
        with pytest.raises(CorpusError, match=rf"image '{name}' cannot be read .* --images"):
            read(name)


def test_special_files_and_odd_names_are_sentences(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "zero").symlink_to("/dev/zero")
    read = read_from_folder(folder)
    for name in ("a\0.png", "pipe.png", "loop", "zero", "x" * 5000, "a/" * 3000, "", ".", "\udc80"):
        with pytest.raises(CorpusError) as caught:
            read(name)
        assert len(str(caught.value)) < 2000
        assert "\0" not in str(caught.value)


NAMES = st.text(st.sampled_from("./ab\0~\n\x1b"), max_size=12)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(name=NAMES)
def test_a_name_gives_a_file_of_the_folder_or_a_sentence(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp() / "names"
    if not root.exists():
        for place in ("outside", "images/a/b", "images/b"):
            (root / place).mkdir(parents=True)
            (root / place / "ab").write_bytes(place.encode())
    found, message = b"images", ""
    try:
        found = read_from_folder(root / "images")(name)
    except CorpusError as error:
        message = str(error)
    assert found.startswith(b"images")
    assert message.isprintable()
    assert len(message) < 2000


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, "PNG")
    return file.getvalue()


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["good", "cut", "missing", "text"]), max_size=40))
def test_every_bad_image_is_counted_and_every_image_looked_at(kinds):
    content = {"good": png(), "cut": png()[:50], "text": b"no image"}
    looked = []
    lock = threading.Lock()

    def read(number, kind):
        with lock:
            looked.append(number)
        if kind == "missing":
            raise CorpusError("it is missing.")
        return content[kind]

    readers = {f"{n}.png": partial(read, n, kind) for n, kind in enumerate(kinds)}
    bad = [f"{n}.png" for n, kind in enumerate(kinds) if kind != "good"]
    shown = []
    if bad:
        with pytest.raises(CorpusError, match=f"^{len(bad)} of {len(kinds)} images") as caught:
            check_images(readers, lambda *said: shown.append(said))
        named = sum(name in str(caught.value) for name in bad)
        assert named == len(bad) or f"and {len(bad) - named} more" in str(caught.value)
        assert len(str(caught.value)) < 2000
    else:
        check_images(readers, lambda *said: shown.append(said))
    assert sorted(looked) == list(range(len(kinds)))
    assert [done for _, done, _ in shown] == list(range(1, len(kinds) + 1))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.dictionaries(st.text(max_size=300), st.text(max_size=600), max_size=60))
def test_a_list_of_problems_is_short_and_complete_in_number(problems):
    text = list_problems(problems)
    assert len(text) < 2000
    assert text.isprintable() or text == ""
