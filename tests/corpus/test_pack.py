"""Tests of movekd.corpus.pack (and of folder.py and report.py, which it alone uses)."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from movekd.corpus.conversations import load_conversations
from movekd.corpus.decode import decode_image
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import index_webdataset, pack_folder, pack_llava
from movekd.errors import ConfigError, CorpusError


def picture(seed, size=(12, 9), format="PNG", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def entry(identity, image=None, question="<image>\nWhat?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "This."}]
    return {
        "id": identity,
        **({} if image is None else {"image": image}),
        "conversations": turns,
        **more,
    }


def folder_bytes(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def source(tmp_path):
    """Six image files (two of one content), and an entry for every kind of trouble."""
    images = tmp_path / "images"
    (images / "coco").mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = {
        "coco/1.png": picture(1),
        "coco/2.jpg": picture(2, format="JPEG", exif=exif),
        "coco/3.png": picture(3, format="WEBP"),  # the extension lies
        "coco/copy.png": picture(1),
        "4.gif": picture(4, format="GIF"),
        "unused.png": picture(5),
        "broken.jpg": picture(6, (90, 90), format="JPEG")[:-900],
        "words.png": b"no picture",
    }
    for name, data in files.items():
        (images / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(picture(7))
    llava = [
        entry("a", "coco/1.png"),
        entry("b", "coco/2.jpg", question_type="which"),
        entry("b", "coco/copy.png"),
        entry("c", "coco/3.png", question="What, without a placeholder?"),
        entry("d", ["coco/1.png", "4.gif"], question="<image> or <image>?"),
        entry("e", ["coco/1.png", "4.gif"], question="<image> or what?"),
        entry("f", question="No image at all."),
        entry("g", "coco/1.png", question="<image> and <image>"),
        entry("h", question="<image>"),
        entry("i", "coco/none.png"),
        entry("j", ["coco/1.png", "broken.jpg"], question="<image><image>"),
        entry("k", "words.png"),
        entry("l", "../secret.png"),
        entry("m", str(tmp_path / "secret.png")),
        entry("n", "coco/../coco/1.png"),
        entry("o", "coco"),
        entry("p", "coco/1.png/x"),
        entry("q", "nul\0.png"),
        {**entry("r", "coco/1.png"), "conversations": [{"from": "gpt", "value": "Hm."}]},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    return tmp_path


def pack(source, out="data", **options):
    options = {"num_workers": 1, **options}
    return pack_llava([source / "llava.json"], source / "images", source / out, **options)


def test_every_image_and_conversation_is_kept_or_accounted_for(source):
    report = pack(source)
    assert (report.num_images, report.num_shards, report.num_names) == (4, 1, 5)
    assert (report.num_entries, report.num_kept, report.num_text_only) == (19, 7, 1)
    assert report.num_kept + report.num_dropped == report.num_entries
    listed = {
        kind: [identity for identity, _ in getattr(report, kind)]
        for kind in report.counts
        if not kind.startswith("num_") and kind != "size_bytes"
    }
    assert listed == {
        "missing_files": ["i", "p"],
        "unreadable_images": ["j", "k", "o", "q"],
        "refused_paths": ["l", "m", "n"],
        "surplus_placeholders": ["g", "h"],
        "malformed_entries": ["r"],
        "duplicate_samples": [],
        "damaged_shards": [],
        "added_placeholders": ["c", "e"],
        "duplicate_ids": ["b"],
        "duplicate_images": ["coco/copy.png"],
    }
    reasons = dict(report.unreadable_images + report.missing_files + report.refused_paths)
    assert "broken.jpg: the image cannot be decoded" in reasons["j"]
    assert "coco cannot be read: Is a directory" in reasons["o"]
    assert reasons["i"] == "coco/none.png does not exist in the image folder"
    assert reasons["l"] == "../secret.png leads out of the image folder"


def test_the_corpus_holds_each_image_once_as_it_was(source):
    report = pack(source)
    corpus = open_corpus(source / "data")
    names = ["coco/1.png", "coco/2.jpg", "coco/3.png", "4.gif"]
    rows = corpus.rows(names)
    assert rows.tolist() == [0, 1, 2, 3]  # in order of first appearance
    assert corpus.rows(["coco/copy.png"]).tolist() == [0]
    for row, name in zip(rows, names, strict=True):
        data = (source / "images" / name).read_bytes()
        assert corpus.read_image(row) == data
        found = corpus.index.slice(row, 1).to_pylist()[0]
        assert found["key"] == hashlib.sha256(data).hexdigest()
        assert (found["width"], found["height"]) == decode_image(data).size
    assert corpus.index["width"].to_pylist() == [12, 9, 12, 12]
    assert report.size_bytes == sum(corpus.index["size"].to_pylist())
    assert not (source / "data" / ".packing").exists()


def test_conversations_name_images_of_the_corpus_and_have_their_placeholders(source):
    pack(source)
    corpus = open_corpus(source / "data")
    kept = load_conversations(corpus.conversations_path)
    assert [conversation.id for conversation in kept] == ["a", "b", "b", "c", "d", "e", "f"]
    for conversation in kept:
        assert conversation.num_placeholders == len(conversation.images)
        corpus.rows(conversation.images)
    assert kept[1].question_type == "which"
    assert kept[3].turns[0] == ("human", "<image>\nWhat, without a placeholder?")
    assert kept[5].turns[0] == ("human", "<image>\n<image> or what?")


def test_webdataset_reads_the_shards(source):
    import webdataset

    pack(source, max_shard_bytes=4096)
    corpus = open_corpus(source / "data")
    assert len(corpus.shards) > 1
    urls = [str(source / "data" / shard) for shard in corpus.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its streams open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == corpus.index["key"].to_pylist()
    for row, (sample, extension) in enumerate(
        zip(samples, ["png", "jpg", "webp", "gif"], strict=True)
    ):
        assert sample[extension] == corpus.read_image(row)


@pytest.mark.parametrize("max_shard_bytes", [1, 3000, 2**20])
def test_the_same_input_gives_the_same_bytes_with_any_number_of_workers(source, max_shard_bytes):
    for out, num_workers in (("one", 1), ("two", 4)):
        report = pack(source, out, num_workers=num_workers, max_shard_bytes=max_shard_bytes)
        report.write(source / out / "report.json")
    assert folder_bytes(source / "one") == folder_bytes(source / "two")
    for shard in (source / "one").glob("*.tar"):
        with tarfile.open(shard) as tar:
            assert len(tar.getnames()) == 1 or shard.stat().st_size <= max_shard_bytes


def test_an_interrupted_pack_leaves_no_index_and_is_run_again(source):
    def interrupt(done, total):
        assert total == 14
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, progress=interrupt)
    with pytest.raises(CorpusError, match="holds no index"):
        open_corpus(source / "data")
    leftover = source / "data" / ".packing"  # as a killed process leaves it
    leftover.mkdir()
    (leftover / "shard-00007.tar").write_bytes(b"half")
    (source / "data" / "shard-00000.tar").write_bytes(b"of the pack that was killed")
    pack(source)
    pack(source, "whole")
    assert folder_bytes(source / "data") == folder_bytes(source / "whole")


def test_another_corpus_is_replaced_only_when_asked(source):
    pack(source)
    before = folder_bytes(source / "data")
    pack(source)  # the same again is welcome
    assert folder_bytes(source / "data") == before
    entries = json.loads((source / "llava.json").read_text())
    for change in (entries[:2], [*entries, entry("z", "unused.png")], [*entries[1:], entries[0]]):
        (source / "llava.json").write_text(json.dumps(change))
        with pytest.raises(CorpusError, match=r"holds another corpus.*--overwrite"):
            pack(source)
        assert folder_bytes(source / "data") == before
    entries[0]["conversations"][1]["value"] = "Another answer."
    (source / "llava.json").write_text(json.dumps(entries))
    with pytest.raises(CorpusError, match="holds another corpus"):
        pack(source)
    (source / "llava.json").write_text(json.dumps(entries[1:2]))
    pack(source, overwrite=True, max_shard_bytes=1)
    pack(source, "fresh", max_shard_bytes=1)
    assert folder_bytes(source / "data") == folder_bytes(source / "fresh")


def test_appended_entries_keep_the_rows_and_the_fingerprint(source):
    pack(source, max_shard_bytes=3000)
    old = open_corpus(source / "data")
    extra = source / "extra.json"
    extra.write_text(json.dumps([entry("z", "unused.png")]))
    jsons = [source / "llava.json", extra]
    pack_llava(jsons, source / "images", source / "data", max_shard_bytes=3000, overwrite=True)
    new = open_corpus(source / "data")
    assert len(new) == len(old) + 1
    assert new.fingerprint(len(old)) == old.fingerprint()
    assert new.index.slice(0, len(old)).equals(old.index.read())


def test_foreign_tars_are_not_overwritten(source):
    (source / "data").mkdir()
    (source / "data" / "shard-00000.tar").write_bytes(b"precious")
    with pytest.raises(CorpusError, match=r"tars but no index\.parquet.*--webdataset"):
        pack(source)
    assert folder_bytes(source / "data") == {"shard-00000.tar": b"precious"}


def test_hopeless_input_is_refused_in_a_sentence(source):
    with pytest.raises(CorpusError, match="is no folder; expected one of images"):
        pack_llava([source / "llava.json"], source / "nowhere", source / "data")
    with pytest.raises(ConfigError, match=r"none\.json does not exist"):
        pack_llava([source / "none.json"], source / "images", source / "data")
    with pytest.raises(CorpusError, match=r"no image can be used \(.*missing files.*Check"):
        pack_llava([source / "llava.json"], source / "images" / "coco", source / "data")
    (source / "llava.json").write_text(json.dumps([entry("f", question="Only text.")]))
    with pytest.raises(CorpusError, match="no image was found"):
        pack(source)
    with pytest.raises(CorpusError, match=r"words\.png.* cannot be written"):
        pack(source, "images/words.png")
    assert folder_bytes(source / "data") == {}


def test_a_folder_is_packed_in_the_order_of_its_paths(source):
    (source / "images" / "readme.txt").write_text("no image")
    os.symlink("nowhere", source / "images" / "dangling.png")
    calls = []
    report = pack_folder(
        source / "images", source / "data", num_workers=2, progress=lambda *at: calls.append(at)
    )
    corpus = open_corpus(source / "data")
    assert corpus.names["name"].to_pylist() == [
        "4.gif", "coco/1.png", "coco/2.jpg", "coco/3.png", "coco/copy.png", "unused.png",
    ]  # fmt: skip
    assert corpus.rows(corpus.names["name"].combine_chunks()).tolist() == [0, 1, 2, 3, 1, 4]
    assert [name for name, _ in report.unreadable_images] == ["broken.jpg", "words.png"]
    assert [name for name, _ in report.missing_files] == ["dangling.png"]
    assert calls == [(number, 9) for number in range(1, 10)]
    assert corpus.conversations_path is None


def test_file_names_that_are_not_unicode_are_reported(source):
    path = os.fsencode(source / "images") + b"/\xff.png"
    with open(path, "wb") as file:
        file.write(picture(8))
    report = pack_folder(source / "images", source / "data")
    report.write(source / "data" / "report.json")
    assert report.refused_paths == (("?.png", "?.png is not Unicode; rename it"),)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=8))
def test_any_use_of_images_by_entries_is_packed_once(tmp_path_factory, uses):
    """Images 0 to 6 exist (5 and 6 are copies of 0 and 1), 7 to 9 do not."""
    folder = tmp_path_factory.mktemp("use")
    for number in range(7):
        (folder / f"{number}.png").write_bytes(picture(number % 5, (3, 3)))
    entries = [
        entry(str(n), [f"{number}.png" for number in use], question="<image>" * len(use))
        for n, use in enumerate(uses)
    ]
    (folder / "llava.json").write_text(json.dumps(entries))
    used = [number for use in uses for number in use if number < 7]
    if not used:
        return
    report = pack_llava([folder / "llava.json"], folder, folder / "out", num_workers=2)
    assert report.num_images == len({number % 5 for number in used})
    assert report.num_names == len(set(used))
    kept = load_conversations(folder / "out" / "conversations.jsonl") if report.num_kept else []
    assert [int(c.id) for c in kept] == [n for n, use in enumerate(uses) if max(use, default=0) < 7]
    assert len(report.missing_files) == len(uses) - len(kept)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three tars of samples, and four that are not whole."""
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
            ("x/1.jpg", picture(9, format="JPEG")),
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


def test_existing_tars_are_indexed_where_they_are(shards):
    before = folder_bytes(shards)
    report = index_webdataset(shards, num_workers=2)
    after = folder_bytes(shards)
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
        "duplicate_samples": ["9.png", "x/1"],
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


def test_an_index_is_the_same_again_and_replaced_only_when_asked(shards):
    index_webdataset(shards, num_workers=1)
    before = folder_bytes(shards)
    index_webdataset(shards, num_workers=3)
    assert folder_bytes(shards) == before
    shutil.rmtree(shards / "sub")
    with pytest.raises(CorpusError, match=r"holds another corpus.*--overwrite"):
        index_webdataset(shards)
    index_webdataset(shards, overwrite=True)
    assert len(open_corpus(shards)) == 4
    (shards / "index.parquet").write_bytes(b"damaged")
    with pytest.raises(CorpusError, match=r"index\.parquet cannot be read.*--overwrite"):
        index_webdataset(shards)


def test_a_packed_corpus_can_be_indexed_as_a_webdataset(source):
    pack(source, max_shard_bytes=3000)
    packed = open_corpus(source / "data")
    copy = source / "copy"
    copy.mkdir()
    for shard in packed.shards:
        shutil.copy(source / "data" / shard, copy / shard)
    index_webdataset(copy)
    assert open_corpus(copy).index.equals(packed.index)
    assert open_corpus(copy).fingerprint() == packed.fingerprint()
