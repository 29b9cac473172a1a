"""Tests of movekd.corpus.pack, and of image_source, writer and report behind it.

Each kind of entry is in test_pack_entries.py.
"""

import hashlib
import json
import os
import tarfile
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus_files import entry, pack, picture
from movekd.corpus.conversations import load_conversations
from movekd.corpus.decode import decode_image
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder, pack_llava
from movekd.corpus.report import Tally
from movekd.errors import ConfigError, CorpusError


def test_every_image_and_conversation_is_kept_or_accounted_for(source):
    report = pack(source)
    assert (report.num_images, report.num_shards, report.num_names) == (4, 1, 5)
    assert (report.num_entries, report.num_kept, report.num_text_only) == (19, 7, 1)
    assert report.num_kept + report.num_dropped == report.num_entries
    listed = {kind: [identity for identity, _ in all] for kind, all in report.problems.items()}
    assert listed == {
        "missing_files": ["i", "p"],
        "unreadable_images": ["j", "k", "o", "q"],
        "refused_paths": ["l", "m", "n"],
        "surplus_placeholders": ["g", "h"],
        "malformed_entries": ["r"],
        "added_placeholders": ["c", "e"],
        "duplicate_ids": ["b"],
        "duplicate_images": ["coco/copy.png"],
        "rejected_names": [
            *("coco/none.png", "broken.jpg", "words.png", "../secret.png"),
            *(str(source / "secret.png"), "coco/../coco/1.png", "coco", "coco/1.png/x"),
            "nul\0.png",
        ],
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
def test_the_same_input_gives_the_same_bytes_with_any_number_of_workers(
    source, max_shard_bytes, snapshot
):
    for out, num_workers in (("one", 1), ("two", 4)):
        report = pack(source, out, num_workers=num_workers, max_shard_bytes=max_shard_bytes)
        report.write(source / out / "report.json")
    assert snapshot(source / "one") == snapshot(source / "two")
    for shard in (source / "one").glob("*.tar"):
        with tarfile.open(shard) as tar:
            assert len(tar.getnames()) == 1 or shard.stat().st_size <= max_shard_bytes


def test_an_interrupted_pack_leaves_no_index_and_is_run_again(source, snapshot):
    def interrupt(done, total):
        assert total == 14
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, progress=interrupt)
    with pytest.raises(CorpusError, match="holds no index"):
        open_corpus(source / "data")
    leftover = source / "data" / ".packing"  # as a killed process leaves it
    leftover.mkdir(parents=True)
    (leftover / "shard-00007.tar").write_bytes(b"half")
    pack(source)
    pack(source, "whole")
    assert snapshot(source / "data") == snapshot(source / "whole")


def test_another_corpus_is_replaced_only_when_asked(source, snapshot):
    pack(source)
    before = snapshot(source / "data")
    pack(source)  # the same again is welcome
    assert snapshot(source / "data") == before
    entries = json.loads((source / "llava.json").read_text())
    for change in (entries[:2], [*entries, entry("z", "unused.png")], [*entries[1:], entries[0]]):
        (source / "llava.json").write_text(json.dumps(change))
        with pytest.raises(CorpusError, match=r"holds another corpus.*--overwrite"):
            pack(source)
        assert snapshot(source / "data") == before
    entries[0]["conversations"][1]["value"] = "Another answer."
    (source / "llava.json").write_text(json.dumps(entries))
    with pytest.raises(CorpusError, match="holds another corpus"):
        pack(source)
    (source / "llava.json").write_text(json.dumps(entries[1:2]))
    pack(source, overwrite=True, max_shard_bytes=1)
    pack(source, "fresh", max_shard_bytes=1)
    assert snapshot(source / "data") == snapshot(source / "fresh")


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


def test_foreign_tars_are_not_overwritten(source, snapshot):
    (source / "data").mkdir()
    (source / "data" / "shard-00000.tar").write_bytes(b"precious")
    with pytest.raises(CorpusError, match=r"tars but no index\.parquet.*--webdataset"):
        pack(source)
    assert snapshot(source / "data") == {"shard-00000.tar": b"precious"}


def test_hopeless_input_is_refused_in_a_sentence(source, snapshot):
    with pytest.raises(CorpusError, match="is no folder; expected a folder of images"):
        pack_llava([source / "llava.json"], source / "nowhere", source / "data")
    with pytest.raises(ConfigError, match=r"none\.json does not exist"):
        pack_llava([source / "none.json"], source / "images", source / "data")
    with pytest.raises(CorpusError, match=r"no image can be used \(.*missing files.*Check"):
        pack_llava([source / "llava.json"], source / "images" / "coco", source / "data")
    (source / "llava.json").write_text(json.dumps([entry("f", question="Only text.")]))
    with pytest.raises(CorpusError, match="no image was found"):
        pack(source)
    with pytest.raises(CorpusError, match=r"words\.png.* cannot be made"):
        pack(source, "images/words.png")
    assert snapshot(source / "data") == {}


def test_a_folder_is_packed_in_the_order_of_its_paths(source):
    (source / "images" / "readme.txt").write_text("no image")
    os.symlink("nowhere", source / "images" / "dangling.png")
    calls: list[tuple[int, int]] = []
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
    assert [name for name, _ in report.not_images] == ["readme.txt"]
    assert report.sums["files"] == {
        **{"found": 10, "kept": 6, "unreadable_images": 2, "missing_files": 1, "not_images": 1}
    }
    assert calls == [(number, 10) for number in range(1, 11)]
    assert corpus.conversations_path is None


def test_file_names_that_are_not_unicode_are_reported(source):
    path = os.fsencode(source / "images") + b"/\xff.png"
    with open(path, "wb") as file:
        file.write(picture(8))
    report = pack_folder(source / "images", source / "data")
    report.write(source / "data" / "report.json")
    assert report.refused_paths == (("\udcff.png", r"\udcff.png is not Unicode; rename it"),)
    written = json.loads((source / "data" / "report.json").read_text())
    assert written["refused_paths"] == [["\udcff.png", r"\udcff.png is not Unicode; rename it"]]


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


def test_wrong_sums_are_a_bug_and_write_no_corpus(source, monkeypatch):
    monkeypatch.setattr(Tally, "keep", lambda *_: None)
    with pytest.raises(AssertionError, match="do not add up"):
        pack(source)
    with pytest.raises(CorpusError, match="holds no index"):
        open_corpus(source / "data")
