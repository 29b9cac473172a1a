"""Tests of movekd.corpus.webdataset."""

import json
import os
import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus_files import check_sums, entry, picture, write_tar
from movekd.corpus.conversations import load_conversations
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.corpus.webdataset import index_webdataset
from movekd.errors import CorpusError


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
    made = [".movekd-files.json", "conversations.jsonl", "index.parquet", "names.parquet"]
    assert sorted(after) == [*made, "report.json"]
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
    with pytest.raises(CorpusError, match=r"index\.parquet \(of another size\).*--force"):
        index_webdataset(shards, overwrite=True)
    index_webdataset(shards, overwrite=True, force=True)
    assert len(open_corpus(shards)) == 4


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


STYLES = {  # members of a sample with the key K: images by number, and the text
    "same": (["K.jpg"], "K.txt"),
    "dots": (["K.1.5.jpg"], "K.1.5.txt"),
    "more dots": (["K.1.5.png"], "K.1.5.json"),
    "inputs": (["K.input.jpg"], "K.outputs.txt"),
    "whole name": (["K.JPG"], "K.JPG.txt"),
    "unknown suffix": (["K.jfif"], "K.json"),
    "no suffix": (["K"], "K.json"),
    "metadata": (["K.webp"], "K.json with a caption"),
    "two": (["K.left.png", "K.right.png"], "K.json"),
    "second of three": (["K.depth.png", "K.jpg", "K.seg.png"], "K.json naming 1"),
    "listed": (["K.0.png", "K.1.png", "K.2.png"], "K.json naming 2 0"),
    "only images": (["K.a.jpg", "K.b.jpg"], ""),
    "only text": ([], "K.json"),
}
LOST = {  # a member that is left out, and the reason
    "K.png": (b"no image", "unreadable_images"),
    "K.avif": (b"\0\0\0 ftypavif", "unreadable_images"),
    "../K.png": (b"", "refused_paths"),
    "/K.png": (b"", "refused_paths"),
    "K.mp4": (b"0", "unknown_media"),
    "K.cls": (b"3", "unused_members"),
    "d/K.json": (b"[1, 2]", "unused_members"),
}
BAD_TEXTS = {  # the text of a sample whose image is kept, and why its entry is not
    "K.txt": [
        ("é".encode("latin-1"), "undecodable_text"),
        ("words".encode("utf-16"), "undecodable_text"),
        ("words".encode("utf-16-le"), "undecodable_text"),
        (b" \n", "empty_answers"),
    ],
    "K.json": [
        (b"{", "malformed_entries"),
        (json.dumps({**entry("x"), "video": "K.mp4"}).encode(), "unknown_media"),
        (json.dumps(entry("x", ["K.jpg", "no.jpg"])).encode(), "missing_files"),
        (json.dumps({"id": "x", "conversations": []}).encode(), "malformed_entries"),
    ],
}

tars = st.lists(
    st.one_of(
        st.sampled_from(sorted(STYLES)),
        st.sampled_from(sorted(LOST)),
        st.sampled_from([(name, n) for name, all in BAD_TEXTS.items() for n in range(len(all))]),
    ),
    min_size=1,
    max_size=8,
)


def check_tars(folder, drawn, shuffle):
    """Write samples, members in any order; compare what the corpus pairs with what was written."""
    members = [("0.jpg", picture(0, (4, 3), "JPEG"))]
    in_any_order = []
    pairs, lost, bad, kept = {}, Counter(), Counter(), {"0.jpg"}
    for number, what in enumerate(drawn):
        key = f"d/k{number}"
        called = lambda name, key=key: name.replace("K", key)  # noqa: E731
        if what in LOST:
            content, reason = LOST[what]
            members.append((called(what), content))
            lost[reason] += 1
            continue
        if what in STYLES:
            names, text = STYLES[what]
        else:
            names, (text, variant) = ["K.jpg"], what
            content, reason = BAD_TEXTS[text][variant]
            bad[reason] += 1
            members.append((called(text), content))
            text = ""
        data = [picture(100 * number + n, (4, 3), "PNG") for n in range(1, 1 + len(names))]
        members += zip(map(called, names), data, strict=True)
        kept.update(map(called, names))
        if not text:
            continue
        words = f"Text {number}."
        name, _, naming = text.partition(" naming ")
        chosen = [int(n) for n in naming.split()] or list(range(len(names)))
        llava = entry(str(number), question="<image>" * len(chosen) or "What?")
        llava["conversations"][1]["value"] = words
        if naming:
            llava["image"] = [f"/coco/{called(names[n]).rpartition('/')[2]}" for n in chosen]
        if name.endswith(".txt"):
            members.append((called(name), f"{words}\n".encode()))
        elif "caption" in name:
            members.append((called("K.json"), json.dumps({"caption": words}).encode()))
        else:
            members.append((called(name), json.dumps(llava).encode()))
        pairs[words] = [data[n] for n in chosen]
        in_any_order += [words] if not naming else []
    shuffle.shuffle(members)
    order = [data for _, data in members]
    for words in in_any_order:  # where the entry names no image, the order of the tar decides
        pairs[words].sort(key=order.index)
    write_tar(folder / "a.tar", members)
    report = index_webdataset(folder, num_workers=1)
    written = check_sums(report, folder)
    corpus = open_corpus(folder)
    assert kept <= set(corpus.names["name"].to_pylist())
    conversations = (
        load_conversations(corpus.conversations_path) if corpus.conversations_path else []
    )
    found = {c.turns[-1][1]: [corpus.read_image(int(r)) for r in corpus.rows(c.images)]
             for c in conversations}  # fmt: skip
    assert found == pairs
    sums = written["sums"]
    assert sums["members"]["found"] == len(members)
    assert {k: v for k, v in sums["members"].items() if k not in ("found", "kept")} == dict(lost)
    entries = {"found": len(pairs) + bad.total(), "kept": len(pairs), **bad}
    assert sums.get("entries", {"found": 0}) == {
        k: v for k, v in entries.items() if v or k == "found"
    }


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tars, st.randoms(use_true_random=False))
def test_any_tar_pairs_images_with_their_texts_and_lists_the_rest(tmp_path_factory, drawn, shuffle):
    check_tars(tmp_path_factory.mktemp("tar"), drawn, shuffle)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(tars, st.randoms(use_true_random=False))
def test_many_tars_pair_images_with_their_texts_and_list_the_rest(tmp_path_factory, drawn, shuffle):
    check_tars(tmp_path_factory.mktemp("tar"), drawn, shuffle)


def test_images_that_no_conversation_is_about_are_kept_and_listed(tmp_path):
    three = [(f"a.{name}", picture(n)) for n, name in enumerate(["depth.png", "jpg", "seg.png"])]
    write_tar(tmp_path / "a.tar", [*three, ("a.json", json.dumps(entry("a", "x/a.jpg")).encode())])
    report = index_webdataset(tmp_path)
    assert [name for name, _ in report.auxiliary_images] == ["a.tar/a.depth.png", "a.tar/a.seg.png"]
    assert (report.num_images, report.num_dropped) == (3, 0)
    (kept,) = load_conversations(tmp_path / "conversations.jsonl")
    assert (kept.images, kept.turns[0][1]) == (("a.jpg",), "<image>\nWhat?")


def test_an_entry_whose_names_match_nothing_takes_the_order_and_says_so(tmp_path):
    images = [("a.0.png", picture(0)), ("a.1.png", picture(1))]
    llava = entry("a", ["x.png", "y.png"], question="<image><image>")
    write_tar(tmp_path / "a.tar", [*images, ("a.json", json.dumps(llava).encode())])
    plain = [("b.jpg", picture(2)), ("b.seg.png", picture(3))]
    write_tar(tmp_path / "b.tar", [*plain, ("b.json", json.dumps(entry("b", "z.png")).encode())])
    report = index_webdataset(tmp_path)
    assert [name for name, _ in report.images_by_position] == ["a", "b"]
    kept = load_conversations(tmp_path / "conversations.jsonl")
    assert [c.images for c in kept] == [("a.0.png", "a.1.png"), ("b.jpg",)]


def test_equal_names_in_two_tars_are_refused_with_a_remedy(tmp_path):
    for shard, number in (("a.tar", 0), ("b.tar", 1)):
        write_tar(tmp_path / shard, [("1.jpg", picture(number)), ("1.txt", b"Words.")])
    report = index_webdataset(tmp_path)
    listed = dict(report.duplicate_samples)
    assert sorted(listed) == ["b.tar/1.jpg", "b.tar/1.txt"]
    assert "a.tar has an image 1.jpg too" in listed["b.tar/1.txt"]
    assert "rename the members of one tar" in listed["b.tar/1.txt"]
    check_sums(report, tmp_path)


def test_whatever_lies_beside_the_tars_is_listed(tmp_path):
    folder = tmp_path / "wds"
    write_tar(folder / "a.TAR", [("a.png", picture(0))])
    (folder / "0.parquet").write_bytes(b"statistics")
    (folder / "loose.png").write_bytes(picture(1))
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("fifo.tar", "fifo"):
        os.mkfifo(folder / name)
    (folder / "device.tar").symlink_to("/dev/zero")
    report = index_webdataset(folder)
    assert check_sums(report, folder)["sums"] == {
        "files": {
            **{"found": 4, "skipped_folders": 1, "unused_files": 1, "not_images": 1},
            "special_files": 1,
        },
        "members": {"found": 1, "kept": 1},
        "shards": {"found": 3, "kept": 1, "damaged_shards": 2},
    }
    index_webdataset(folder)  # the index beside the tars is no news
    assert report.num_dropped == 5
