"""Tests of movekd.corpus.webdataset."""

import io
import json
import shutil
import tarfile

import pytest

from corpus_files import entry, picture
from movekd.corpus.conversations import load_conversations
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.corpus.webdataset import index_webdataset
from movekd.errors import CorpusError


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three tars of samples, and tars that are damaged, empty or compressed."""
    folder = tmp_path / "wds"
    as_json = lambda content: json.dumps(content).encode()  # noqa: E731
    write_tar(
        folder / "a.tar",
        [
            ("x/0.jpg", picture(0, format="JPEG")),
            ("x/0.txt", b" A caption.\n"),
            ("x/1.PNG", picture(1)),
            ("x/1.json", as_json(entry("one", "some/other/path.png"))),
            ("x/2.webp", picture(2, format="WEBP")),
            ("x/2.json", as_json([entry("two"), entry("two b", question="Why?")])),
            ("x/3.jpeg", picture(0, format="JPEG")),
            ("x/3.json", as_json({"width": 12, "url": "metadata of a downloader"})),
            ("x/3.txt", b"Another."),
        ],
    )
    write_tar(
        folder / "sub" / "b.tar",
        [
            ("x/1.PNG", picture(9)),
            ("x/1.txt", b"Of a sample that was there already."),
            ("4.left.png", picture(4)),
            ("4.right.png", picture(5)),
            ("4.json", as_json({"conversations": entry("")["conversations"]})),
            ("5.png", b"no image"),
            ("5.txt", b"Of an unreadable image."),
            ("6.png", picture(6)),
            ("6.json", b"{"),
            ("7.json", as_json(entry("seven", question="Text only."))),
            ("8.json", as_json(entry("eight", "8.png"))),
            ("9.png", picture(10)),
            ("9.png", picture(11)),
            ("unrelated", b""),
        ],
    )
    write_tar(
        folder / "c.tar", [("y.png", picture(12, (60, 60))), ("z.png", picture(13, (60, 60)))]
    )
    (folder / "c.tar").write_bytes((folder / "c.tar").read_bytes()[:15_000])
    write_tar(folder / "no_image.tar", [("a.cls", b"1")])
    (folder / "nothing.tar").write_bytes(b"")
    (folder / "zipped.tar.gz").write_bytes(b"\x1f\x8b")
    return folder


def test_existing_tars_are_indexed_where_they_are(shards, snapshot):
    before = snapshot(shards)
    report = index_webdataset(shards, num_workers=2)
    after = snapshot(shards)
    assert {name: after.pop(name) for name in before} == before
    assert sorted(after) == ["conversations.jsonl", "index.parquet", "names.parquet"]
    corpus = open_corpus(shards)
    contents = {
        **{"x/0": picture(0, format="JPEG"), "x/1": picture(1), "y": picture(12, (60, 60))},
        **{"x/3": picture(0, format="JPEG"), "4.right.png": picture(5), "9": picture(10)},
    }
    for name, data in contents.items():
        assert corpus.read_image(int(corpus.rows([name])[0])) == data
    assert corpus.rows(["x/1", "4"]).tolist() == corpus.rows(["x/1.PNG", "4.left.png"]).tolist()
    assert len(set(corpus.names["name"].to_pylist())) == len(corpus.names)
    assert report.num_images == len(corpus) == 8
    listed = {kind: [i for i, _ in getattr(report, kind)] for kind in
              ("duplicate_samples", "unreadable_images", "missing_files", "malformed_entries",
               "damaged_shards", "duplicate_images", "added_placeholders")}  # fmt: skip
    assert listed == {
        "duplicate_samples": ["sub/b.tar/9.png", "sub/b.tar/x/1.PNG", "sub/b.tar/x/1.txt"],
        "unreadable_images": ["sub/b.tar/5.png", "5"],
        "missing_files": ["eight"],
        "malformed_entries": ["6"],
        "damaged_shards": ["zipped.tar.gz", "c.tar", "no_image.tar", "nothing.tar"],
        "duplicate_images": ["x/3.jpeg"],
        "added_placeholders": ["two b", "4"],
    }


def test_conversations_of_existing_tars_are_about_their_own_images(shards):
    report = index_webdataset(shards)
    corpus = open_corpus(shards)
    kept = {c.id: c for c in load_conversations(corpus.conversations_path)}
    assert list(kept) == ["x/0", "one", "two", "two b", "x/3", "4", "seven"]
    assert kept["x/0"].turns == (("human", "<image>"), ("gpt", "A caption."))
    assert kept["one"].images == ("x/1",)
    assert kept["4"].images == ("4.left.png", "4.right.png")
    assert kept["seven"].images == ()
    for conversation in kept.values():
        assert conversation.num_placeholders == len(conversation.images)
        corpus.rows(conversation.images)
    assert (report.num_kept, report.num_text_only, report.num_entries) == (7, 1, 10)


def test_an_index_is_the_same_again_and_replaced_only_when_asked(shards, snapshot):
    index_webdataset(shards, num_workers=1)
    before = snapshot(shards)
    index_webdataset(shards, num_workers=3)
    assert snapshot(shards) == before
    shutil.rmtree(shards / "sub")
    with pytest.raises(CorpusError, match=r"holds another corpus.*--overwrite"):
        index_webdataset(shards)
    index_webdataset(shards, overwrite=True)
    assert len(open_corpus(shards)) == 4
    (shards / "index.parquet").write_bytes(b"damaged")
    with pytest.raises(CorpusError, match=r"index\.parquet cannot be read.*--overwrite"):
        index_webdataset(shards)


def test_a_packed_corpus_can_be_indexed_as_a_webdataset(tmp_path, crops):
    images, data, copy = (tmp_path / name for name in ("images", "data", "copy"))
    images.mkdir()
    copy.mkdir()
    for number, crop in enumerate(crops[:8]):
        crop.save(images / f"{number}.png")
    pack_folder(images, data, max_shard_bytes=10_000)
    packed = open_corpus(data)
    assert len(packed.shards) > 1
    for shard in packed.shards:
        shutil.copy(data / shard, copy / shard)
    index_webdataset(copy)
    assert open_corpus(copy).index.equals(packed.index)
    assert open_corpus(copy).fingerprint() == packed.fingerprint()
