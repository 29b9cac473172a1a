"""Tests of movekd.corpus.tar."""

import contextlib
import hashlib
import io
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.corpus.tar import ShardWriter, read_members, split_member
from movekd.errors import CorpusError


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    max_bytes=st.integers(1, 12_000),
)
def test_members_lie_where_the_writer_says(tmp_path_factory, sizes, max_bytes):
    folder = tmp_path_factory.mktemp("tars")
    contents = [hashlib.sha256(bytes([n])).digest() * 100 for n in range(len(sizes))]
    contents = [data[:size] for data, size in zip(contents, sizes, strict=True)]
    with contextlib.closing(ShardWriter(folder, max_bytes)) as writer:
        places = [writer.add(f"{n}.jpg", data) for n, data in enumerate(contents)]
    for data, (shard, offset) in zip(contents, places, strict=True):
        assert (folder / shard).read_bytes()[offset : offset + len(data)] == data
    members = []
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(names) == 1 or path.stat().st_size <= max_bytes
        read = list(read_members(path))
        assert [member.name for member in read] == names
        members += [(path.name, member.offset) for member in read]
    assert members == places


def test_a_full_disk_is_an_error_once(tmp_path):
    """The corpus builder closes its writer again when it cleans up."""
    (tmp_path / "shard-00000.tar").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path, 2**20)
    writer.add("a.jpg", b"1")
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    writer.close()


def make_tar(path, num_members=3):
    with tarfile.open(path, "w") as tar:
        for number in range(num_members):
            info = tarfile.TarInfo(f"{number}" + "x" * 150 + ".jpg")  # needs a longer header
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes([number + 1]) * 700))


def test_members_of_any_tar_are_found(tmp_path):
    path = tmp_path / "a.tar"
    make_tar(path)
    data = path.read_bytes()
    for number, member in enumerate(read_members(path)):
        assert data[member.offset :][: member.size] == bytes([number + 1]) * 700


def test_damage_is_told_after_the_whole_members(tmp_path):
    whole = tmp_path / "whole.tar"
    make_tar(whole)
    last = list(read_members(whole))[-1]
    data = whole.read_bytes()
    path = tmp_path / "damaged.tar"
    header = last.offset - 512
    for damaged, num_members in (
        (data[: last.offset + 300], 2),  # in the last member's bytes
        (data[: header + 100], 2),  # in its header
        (data[:header] + b"\1" * 512 + data[last.offset :], 2),
        (b"", 0),
        (b"no tar" * 300, 0),
    ):
        path.write_bytes(damaged)
        members = read_members(path)
        for _ in range(num_members):
            next(members)
        with pytest.raises(
            CorpusError, match=r"damaged.tar is damaged or compressed.*Copy it again"
        ):
            next(members)


def test_a_tar_without_its_last_empty_blocks_is_whole(tmp_path):
    path = tmp_path / "a.tar"
    make_tar(path)
    last = list(read_members(path))[-1]
    path.write_bytes(path.read_bytes()[: last.offset + 1024])
    assert len(list(read_members(path))) == 3


def header(kind, size, payload=b""):
    """Return a header of a tar with any size, even one below zero, and its payload."""
    member = tarfile.TarInfo("a.jpg")
    member.type, member.size = kind, abs(size)
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        raw[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw) + payload + bytes(-len(payload) % 512)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (header(b"x", 2**31), "a header of more than"),
        (header(b"L", 2**31), "a header of more than"),
        (header(b"x", -512), "a header of more than"),
        (header(b"0", -512), "a wrong size"),
        (header(b"0", -(2**40)), "a wrong size"),
        (header(b"x", 200_000, b"1" * 200_000), "a number of more than 255 digits"),
        (header(b"x", 512, b"1 a=1\n" * 80) * 500, "a header of more than"),
        (header(b"x", 30, b"30 size=9" + b"9" * 20 + b"\n") + header(b"0", 3, b"abc"), "damaged"),
    ],
)
def test_hostile_headers_are_refused_at_once(tmp_path, raw, message):
    path = tmp_path / "a.tar"
    path.write_bytes(raw + header(b"0", 3, b"abc") + bytes(1024))
    with path.open("ab") as file:
        file.truncate(2**32)  # sparse, so that a header of 2 GiB could be read
    with pytest.raises(CorpusError, match=message):
        list(read_members(path))


def test_what_is_no_file_in_a_tar_is_named(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("link", b"2"), ("hard", b"1"), ("fifo", b"6"), ("dir", b"5")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("file"))
    refusals = {member.name: member.refusal for member in read_members(path)}
    assert refusals == {
        **{"link": "is a link to /etc/passwd", "hard": "is a link to /etc/passwd"},
        **{"fifo": "is no regular file", "file": ""},
    }


def test_a_tar_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "device.tar").symlink_to("/dev/zero")
    for name in ("fifo.tar", "device.tar"):
        with pytest.raises(CorpusError, match="is no regular file; expected a plain tar"):
            list(read_members(tmp_path / name))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_is_an_error_or_gives_members_of_the_tar(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    make_tar(path)
    raw = bytearray(path.read_bytes())
    for place, value in changes:
        raw[place % len(raw)] = value
    path.write_bytes(raw)
    with contextlib.suppress(CorpusError):
        for member in read_members(path):
            assert member.offset >= 0
            assert member.refusal or member.offset + member.size <= len(raw)


@pytest.mark.parametrize(
    "name", ["a.jpg", "b/a.left.JPG", "b.c/a.jpg", "./a.jpg", "a", "b.c/a", ".hidden", "a.", "a/"]
)
def test_names_split_as_webdataset_splits_them(name):
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    expected = None if key is None else (key, extension.lower())
    assert split_member(name) == expected
