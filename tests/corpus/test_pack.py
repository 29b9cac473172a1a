"""Tests of movekd.corpus.pack, and of image_source, writer and report behind it."""

import hashlib
import json
import os
import tarfile
import warnings
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from corpus_files import check_sums, entry, picture
from movekd.corpus.conversations import load_conversations
from movekd.corpus.decode import decode_image
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder, pack_llava
from movekd.corpus.report import Tally
from movekd.errors import ConfigError, CorpusError


@pytest.fixture
def source(tmp_path):
    """Six image files, two of them equal, and an entry for every kind of problem."""
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


def _with_turns(*turns):
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}


ENTRIES = {  # an entry -> what happens: names of its images if it is kept, or the reason
    "plain": (entry("x", "coco/1.png"), ["coco/1.png"]),
    "text only": (entry("x", question="What?"), []),
    "no image": (entry("x", question="What?") | {"image": None, "images": []}, []),
    "list": (
        entry("x", ["4.gif", "coco/1.png"], question="<image><image>"),
        ["4.gif", "coco/1.png"],
    ),
    "images": (entry("x") | {"images": ["coco/3.png"]}, ["coco/3.png"]),
    "copy": (entry("x", "coco/copy.png"), ["coco/copy.png"]),
    "video frame": (entry("x", "4.gif") | {"video_id": "v7", "image_size": [3, 4]}, ["4.gif"]),
    "OpenAI": (
        {
            **{"id": "x", "image": "4.gif"},
            "conversations": [
                {"role": "user", "content": "<image>"},
                {"role": "assistant", "content": "Yes."},
            ],
        },
        ["4.gif"],
    ),
    "HTML": (_with_turns(("human", "What is <video></video>?"), ("gpt", "A tag.")), []),
    "greeting": (_with_turns(("gpt", "Hello."), ("human", "Why?"), ("gpt", "So.")), []),
    "two questions": (_with_turns(("human", "Why?"), ("human", "How?"), ("gpt", "So.")), []),
    "one blank": (
        _with_turns(("human", "Why?"), ("gpt", ""), ("human", "How?"), ("gpt", "So.")),
        [],
    ),
    "system": (_with_turns(("system", "Be brief."), ("human", "Why?"), ("gpt", "So.")), []),
    **{
        f"key {key}": (entry("x", question="<image>") | {key: value}, "unknown_media")
        for key, value in {
            **{"video": "a.mp4", "videos": ["a.mp4"], "audio": "a.wav", "pdf": "a.pdf"},
            **{"image_path": "4.gif", "img": "4.gif", "image_file": "4.gif", "imagePath": "4.gif"},
            **{"picture": "4.gif", "image_id": 7, "file_name": "4.gif", "pixel_values": [[0]]},
        }.items()
    },
    "image and video": (entry("x", "4.gif") | {"video": "a.mp4"}, "unknown_media"),
    "<video>": (entry("x", question="<video>\nWhat?"), "unknown_media"),
    "<audio>": (entry("x", question="What is <audio>?"), "unknown_media"),
    "two kinds": (entry("x", "4.gif") | {"images": ["coco/1.png"]}, "malformed_entries"),
    "empty name": (entry("x", ""), "malformed_entries"),
    "number": (7, "malformed_entries"),
    "null": (None, "malformed_entries"),
    "wrong role": (_with_turns(("Bob", "Why?"), ("gpt", "So.")), "malformed_entries"),
    "system last": (_with_turns(("human", "Why?"), ("system", "So.")), "malformed_entries"),
    "no turns": ({"id": "x", "image": "4.gif", "conversations": []}, "malformed_entries"),
    "image in a greeting": (
        _with_turns(("gpt", "<image>"), ("human", "Why?"), ("gpt", "So.")) | {"image": "4.gif"},
        "malformed_entries",
    ),
    "question": (_with_turns(("human", "Why?")), "no_answers"),
    "blank": (_with_turns(("human", "Why?"), ("gpt", " \n")), "empty_answers"),
    "surplus": (entry("x", "4.gif", question="<image><image>"), "surplus_placeholders"),
    "missing": (entry("x", "none.png"), "missing_files"),
    "broken": (entry("x", ["4.gif", "broken.jpg"], question="<image><image>"), "unreadable_images"),
    "words": (entry("x", "words.png"), "unreadable_images"),
    "fifo": (entry("x", "fifo.png"), "special_files"),
    "device": (entry("x", "device.png"), "special_files"),
    "out": (entry("x", "../secret.png"), "refused_paths"),
}  # fmt: skip


def check_entries(source, folder, names, is_lines):
    """Number the entries, pack them, and compare what is kept and listed with ENTRIES."""
    entries = [entry("first", "coco/1.png")]
    for number, name in enumerate(names):
        value = ENTRIES[name][0]
        if isinstance(value, dict):
            value = {("sample_id" if number % 3 == 1 else "id"): number, **value, "id": number}
            value["conversations"] = [dict(turn) for turn in value["conversations"]]
            for turn in value["conversations"]:
                what = "content" if "role" in turn else "value"
                if (
                    turn.get("from", turn.get("role")) in ("gpt", "assistant")
                    and turn[what].strip()
                ):
                    turn[what] += f" {number}"
            if number % 3 == 1:
                del value["id"]
        entries.append(value)
    path = folder / ("llava.jsonl" if is_lines else "llava.json")
    lines = [json.dumps(value) for value in entries]
    path.write_text("\n".join(lines) if is_lines else f"[{','.join(lines)}]")
    report = pack_llava([path], source / "images", folder / "out", num_workers=1)
    written = check_sums(report, folder / "out")
    kept = load_conversations(folder / "out" / "conversations.jsonl")[1:]
    outcomes = [ENTRIES[name][1] for name in names]
    expected = [(str(n), all) for n, all in enumerate(outcomes) if isinstance(all, list)]
    assert [(c.id, list(c.images)) for c in kept] == expected
    assert all(c.turns[-1][1].endswith(f" {c.id}") for c in kept)
    corpus = open_corpus(folder / "out")
    for name in {image for conversation in kept for image in conversation.images}:
        data = (source / "images" / name).read_bytes()
        assert corpus.read_image(int(corpus.rows([name])[0])) == data
    reasons = Counter(all for all in outcomes if isinstance(all, str))
    assert written["sums"]["entries"] == {
        **{"found": len(entries), "kept": len(kept) + 1},
        **reasons,
    }
    for reason in reasons:
        expected_ids = [
            str(n) if isinstance(entries[n + 1], dict) else str(n + 1 + is_lines)
            for n, outcome in enumerate(outcomes)
            if outcome == reason
        ]
        # those that fail at their image come after all that fail before
        assert sorted(identity for identity, _ in written[reason]) == sorted(expected_ids)


@pytest.fixture
def special_source(source):
    os.mkfifo(source / "images" / "fifo.png")
    (source / "images" / "device.png").symlink_to("/dev/zero")
    return source


@pytest.mark.parametrize("is_lines", [False, True])
def test_every_kind_of_entry_is_kept_or_listed_with_its_id(special_source, tmp_path, is_lines):
    check_entries(special_source, tmp_path, list(ENTRIES), is_lines)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.sampled_from(sorted(ENTRIES)), max_size=12), st.booleans())
def test_any_entries_are_kept_or_listed(special_source, tmp_path_factory, names, is_lines):
    check_entries(special_source, tmp_path_factory.mktemp("entries"), names, is_lines)


def test_what_is_unusual_about_kept_entries_is_said(source):
    unusual = [
        {key: value for key, value in entry("", "4.gif").items() if key != "id"},
        *(ENTRIES[name][0] for name in ("greeting", "two questions", "one blank", "system")),
        _with_turns(("gpt", "Only an answer.")),
        json.loads(r'{"id": "x", "conversations": [{"from": "human", "value": "\ud83d"},'
                   r' {"from": "gpt", "value": "So."}]}'),
    ]  # fmt: skip
    (source / "llava.json").write_text(json.dumps(unusual))
    report = pack(source)
    assert report.num_dropped == 0
    listed = {kind: len(all) for kind, all in report.problems.items() if kind != "duplicate_ids"}
    assert listed == {
        **{"numbered_entries": 1, "leading_answers": 2, "unordered_turns": 1, "blank_answers": 1},
        **{"system_turns": 1, "replaced_characters": 1},
    }
    kept = load_conversations(source / "data" / "conversations.jsonl")
    assert kept[0].id == "0"
    assert kept[4].turns == (("human", "Be brief.\n\nWhy?"), ("gpt", "So."))
    assert kept[6].turns[0] == ("human", "?")


def test_a_broken_line_is_an_entry_that_is_listed(source):
    path = source / "llava.jsonl"
    good = json.dumps(entry("a", "4.gif")).encode()
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, b"{", "é".encode("latin-1"), b"", good]))
    report = pack_llava([path], source / "images", source / "data")
    assert [identity for identity, _ in report.malformed_entries] == ["2", "3"]
    assert (report.num_entries, report.num_kept) == (4, 2)
    os.mkfifo(source / "fifo.json")
    with pytest.raises(ConfigError, match=r"fifo\.json is no regular file.*expected a file"):
        pack_llava([source / "fifo.json"], source / "images", source / "data")


def test_wrong_sums_are_a_bug_and_write_no_corpus(source, monkeypatch):
    monkeypatch.setattr(Tally, "keep", lambda *_: None)
    with pytest.raises(AssertionError, match="do not add up"):
        pack(source)
    with pytest.raises(CorpusError, match="holds no index"):
        open_corpus(source / "data")
