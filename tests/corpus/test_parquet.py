"""Tests of movekd.corpus.parquet against a plain account of the rows that were written."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus_files import check_sums, picture
from movekd.corpus import parquet as module
from movekd.corpus.conversations import load_conversations
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.corpus.parquet import pack_parquet
from movekd.errors import ConfigError, CorpusError
from parquet_kit import SCHEMAS, row_of, write_rows

ONE, MANY = SCHEMAS["LLaVA-OneVision-Data"], SCHEMAS["FineVision"]
GOOD = [picture(seed, (4, 3), format) for seed, format in enumerate(["PNG", "JPEG", "WEBP", "PNG"])]
BROKEN = picture(6, (90, 90), format="JPEG")[:-900]

CASES = {  # images as (bytes, path), question and answer -> the reason for which it is dropped
    "plain": ([(GOOD[0], "0.png")], "<image>\nWhat?", "This.", None),
    "no placeholder": ([(GOOD[1], "1.jpg")], "What?", "This.", None),
    "no path": ([(GOOD[2], None)], "<image>\nWhat?", "This.", None),
    "same path": ([(GOOD[3], "0.png")], "<image>\nWhat?", "This.", None),
    "other path": ([(GOOD[0], "d/0.png")], "<image>\nWhat?", "This.", None),
    "strange path": ([(GOOD[0], "/etc/../passwd")], "What?", "This.", None),
    "path like ours": ([(GOOD[1], "0.parquet:0:0")], "What?", "This.", None),
    "text only": ([], "Why?", "So.", None),
    "HTML": ([], "What is <video></video>?", "A tag.", None),
    "only a path": ([(None, "0.png")], "<image>\nWhat?", "This.", "images_without_bytes"),
    "broken": ([(BROKEN, "2.png")], "What?", "This.", "unreadable_images"),
    "words": ([(b"no picture", None)], "What?", "This.", "unreadable_images"),
    "nothing": ([(b"", None)], "What?", "This.", "unreadable_images"),
    "surplus": ([(GOOD[0], "0.png")], "<image> and <image>?", "This.", "surplus_placeholders"),
    "lost image": ([], "<image>\nWhat?", "This.", "surplus_placeholders"),
    "blank": ([(GOOD[0], "0.png")], "What?", " \n", "empty_answers"),
    "video": ([], "<video>\nWhat?", "This.", "unknown_media"),
    "no question": ([(GOOD[0], "0.png")], None, "This.", "malformed_entries"),
    "no answer": ([(GOOD[1], None)], "What?", None, "malformed_entries"),
}
LISTS = {  # of columns that hold several images
    "two": ([(GOOD[0], "0.png"), (GOOD[1], None)], "Which?", "This.", None),
    "one twice": ([(GOOD[2], "0.png"), (GOOD[2], "2.png")], "Which?", "This.", None),
    "one of two": ([(GOOD[3], None), (BROKEN, None)], "Which?", "This.", "unreadable_images"),
    "a null": ([(None, None), (GOOD[3], "0.png")], "Which?", "No.", "images_without_bytes"),
}


def check_rows(folder, name, drawn, cuts, max_bytes):
    """Write rows as a data set is published; compare the corpus with what was written.

    Args:
        folder: an empty folder.
        name: the data set.
        drawn: names of cases.
        cuts: rows per file, rows per row group.
        max_bytes: bytes of rows that are read at a time.
    """
    schema, cases = SCHEMAS[name], CASES if "image" in SCHEMAS[name].names else CASES | LISTS
    rows, pairs, reasons, num_images = [], {}, Counter(), 0
    image_reasons = Counter()
    for number, case in enumerate(["plain", *drawn]):
        images, question, answer, reason = cases[case]
        answer = f"{answer} {number}" if answer and answer.strip() else answer
        rows.append(row_of(schema, f"id-{number}", images, [(question, answer)]))
        num_images += len(images)
        if reason is None:
            pairs[answer] = [data for data, _ in images]
            continue
        reasons[reason] += 1
        for data, _ in images:
            if reason in ("images_without_bytes", "unreadable_images"):
                image_reasons[reason] += data not in GOOD
            else:
                image_reasons["unused_images"] += 1
    per_file, per_group = cuts
    for start in range(0, len(rows), per_file):
        path = folder / "set" / f"{start:03}.parquet"
        write_rows(path, schema, rows[start : start + per_file], row_group_size=per_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_BYTES", max_bytes)
        report = pack_parquet([str(folder / "set")], folder / "data", num_workers=2)
    sums = check_sums(report, folder / "data")["sums"]
    assert sums["entries"] == {"found": len(rows), "kept": len(pairs), **reasons}
    kept = num_images - image_reasons.total()
    assert sums["images"] == {"found": num_images, "kept": kept, **+image_reasons}
    corpus = open_corpus(folder / "data")
    conversations = load_conversations(corpus.conversations_path)
    found = {c.turns[-1][1]: [corpus.read_image(int(r)) for r in corpus.rows(c.images)]
             for c in conversations}  # fmt: skip
    assert found == pairs
    assert all(c.num_placeholders == len(c.images) for c in conversations)
    if "id" in schema.names:
        expected = [f"id-{answer.rpartition(' ')[2]}" for answer in pairs]
    else:
        places = [divmod(int(answer.rpartition(" ")[2]), per_file) for answer in pairs]
        expected = [f"{file * per_file:03}.parquet:{row}" for file, row in places]
    assert [c.id for c in conversations] == expected
    return report


sizes = st.tuples(st.integers(1, 6), st.integers(1, 4))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(SCHEMAS)), st.data(), sizes, st.sampled_from([1, 300, 10**6]))
def test_any_rows_are_paired_with_their_images_or_listed(
    tmp_path_factory, name, data, cuts, max_bytes
):
    cases = sorted(CASES if "image" in SCHEMAS[name].names else CASES | LISTS)
    drawn = data.draw(st.lists(st.sampled_from(cases), max_size=10))
    check_rows(tmp_path_factory.mktemp("rows"), name, drawn, cuts, max_bytes)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SCHEMAS)), st.data(), sizes, st.sampled_from([1, 300, 10**6]))
def test_many_rows_are_paired_with_their_images_or_listed(
    tmp_path_factory, name, data, cuts, max_bytes
):
    cases = sorted(CASES if "image" in SCHEMAS[name].names else CASES | LISTS)
    drawn = data.draw(st.lists(st.sampled_from(cases), max_size=30))
    check_rows(tmp_path_factory.mktemp("rows"), name, drawn, cuts, max_bytes)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_case_is_paired_or_listed(tmp_path, name):
    cases = CASES if "image" in SCHEMAS[name].names else CASES | LISTS
    check_rows(tmp_path, name, list(cases), (100, 100), 10**6)


def test_the_corpus_is_that_of_the_same_entries_in_json(tmp_path):
    """Rows with their paths as names give the shards, the index and the conversations of JSON."""
    rows, entries = [], []
    for number, data in enumerate([GOOD[0], GOOD[1], GOOD[0], BROKEN, GOOD[3]]):
        name = f"{number}.png"
        rows.append(row_of(ONE, str(number), [(data, name)], [("What?", "This."), ("Why?", "So.")]))
        (tmp_path / name).write_bytes(data)
        entries.append({"id": str(number), "image": name})
        entries[-1]["conversations"] = rows[-1]["conversations"]
    rows.append(row_of(ONE, "t", [], [("Why?", "So.")]))
    entries.append({"id": "t", "conversations": rows[-1]["conversations"]})
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    path = write_rows(tmp_path / "a.parquet", ONE, rows)
    pack_llava([tmp_path / "llava.json"], tmp_path, tmp_path / "json", num_workers=1)
    pack_parquet([str(path)], tmp_path / "parquet", num_workers=1)
    for file in ("shard-00000.tar", "index.parquet", "names.parquet", "conversations.jsonl"):
        assert (tmp_path / "json" / file).read_bytes() == (tmp_path / "parquet" / file).read_bytes()


def test_names_are_paths_or_places(tmp_path):
    images = [
        *[(GOOD[0], "0.png"), (GOOD[0], "0.png"), (GOOD[0], "again.png"), (GOOD[0], None)],
        *[(GOOD[1], "0.png"), (GOOD[1], "0.png"), (GOOD[2], None), (GOOD[3], "/3.png")],
    ]
    rows = [row_of(ONE, str(n), [image], [("What?", "This.")]) for n, image in enumerate(images)]
    report = pack_parquet([str(write_rows(tmp_path / "a.parquet", ONE, rows))], tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    assert corpus.names["name"].to_pylist() == [
        *["0.png", "again.png", "a.parquet:4:0", "a.parquet:6:0", "a.parquet:7:0"]
    ]
    kept = load_conversations(corpus.conversations_path)
    assert [c.images[0] for c in kept] == [
        *["0.png", "0.png", "again.png", "0.png", "a.parquet:4:0", "a.parquet:4:0"],
        *["a.parquet:6:0", "a.parquet:7:0"],
    ]
    assert [identity for identity, _ in report.renamed_images] == ["a.parquet:4:0"]
    assert [name for name, _ in report.duplicate_images] == [
        *["again.png", "a.parquet:3:0", "a.parquet:5:0"]
    ]


def test_turns_of_a_row_become_one_conversation(tmp_path):
    texts = [("Which?", "The first."), ("Why?", "It is red.")]
    images = [(GOOD[0], None), (GOOD[1], None)]
    path = write_rows(tmp_path / "a.parquet", MANY, [row_of(MANY, "", images, texts)] * 3)
    report = pack_parquet([str(path)], tmp_path / "data")
    (first, *_) = load_conversations(tmp_path / "data" / "conversations.jsonl")
    assert first.turns == (
        *(("human", "<image>\n<image>\nWhich?"), ("gpt", "The first.")),
        *(("human", "Why?"), ("gpt", "It is red.")),
    )
    ((label, reason),) = report.added_placeholders  # one line per file, not per row
    assert label == "a.parquet"
    assert "in 3 rows, one per image was put before the first question" in reason
    assert not report.numbered_entries


def test_columns_that_nothing_reads_are_named_once(tmp_path):
    for name, schema in SCHEMAS.items():
        rows = [row_of(schema, "a", [(GOOD[0], None)], [("What?", "This.")])]
        write_rows(tmp_path / "sets" / name / "0.parquet", schema, rows)
    (tmp_path / "sets" / "README.md").touch()
    report = pack_parquet([str(tmp_path / "sets")], tmp_path / "data")
    assert report.num_dropped == 0
    assert [name for name, _ in report.unused_files] == ["README.md"]
    unused = dict(report.unused_columns)
    ratings = [name for name in MANY.names if "rating" in name or name.endswith("_min")]
    assert set(unused) == {"data_source", "source", "texts.source", *ratings}
    assert unused["data_source"] == "nothing reads it; 2 of 4 files have it"
    assert report.sums["columns"] == {"found": 16, "kept": 5, "unused_columns": 11}


def test_a_row_about_a_video_is_dropped(tmp_path):
    schema = ONE.append(pa.field("video", pa.struct([("bytes", pa.binary())])))
    rows = [row_of(schema, str(n), [], [("What?", "This.")]) for n in range(3)]
    rows[1]["video"] = {"bytes": b"mp4"}
    rows[2]["video"] = {"bytes": b""}
    rows += [row_of(schema, "3", [(GOOD[0], None)], [("What?", "This.")])]
    report = pack_parquet([str(write_rows(tmp_path / "a.parquet", schema, rows))], tmp_path / "d")
    assert [identity for identity, _ in report.unknown_media] == ["1"]
    assert report.num_kept == 3


def test_text_that_is_no_utf8_drops_its_row(tmp_path):
    texts = [("What?", "This."), ("What?", "\u00e9\u00e9\u00e9"), ("Why?", "So.")]
    rows = [row_of(ONE, "", [(GOOD[n], f"{n}é")], [pair]) for n, pair in enumerate(texts)]
    path = write_rows(tmp_path / "a.parquet", ONE, rows, compression="none", use_dictionary=False)
    raw = path.read_bytes().replace("ééé".encode(), b"\xff" * 6)
    path.write_bytes(raw.replace("2é".encode(), b"2\xff\xff"))
    report = pack_parquet([str(path)], tmp_path / "data")
    assert [identity for identity, _ in report.undecodable_text] == ["a.parquet:1"]
    assert [identity for identity, _ in report.unused_images] == ["a.parquet:1:0"]
    assert open_corpus(tmp_path / "data").names["name"].to_pylist() == ["0é", "a.parquet:2:0"]


def test_a_damaged_file_is_listed_and_the_others_are_packed(tmp_path):
    rows = [row_of(ONE, str(n), [(GOOD[n], None)], [("What?", "This.")]) for n in range(4)]
    first = write_rows(tmp_path / "0.parquet", ONE, rows, row_group_size=2)
    second = write_rows(tmp_path / "1.parquet", ONE, rows[:1])
    page = pq.read_metadata(first).row_group(1).column(1).dictionary_page_offset
    raw = bytearray(first.read_bytes())
    raw[page : page + 8] = b"\xff" * 8
    first.write_bytes(raw)
    calls = []
    report = pack_parquet(
        [str(first), str(second)], tmp_path / "data", progress=lambda *at: calls.append(at)
    )
    ((label, reason),) = report.damaged_files
    assert label == "0.parquet"
    assert "row 2: " in reason
    assert "2 of 4 rows were read" in reason
    assert report.sums["files"] == {"found": 2, "kept": 1, "damaged_files": 1}
    assert report.sums["entries"] == {"found": 3, "kept": 3}
    assert calls == [(2, 5), (4, 5), (5, 5)]
    check_sums(report, tmp_path / "data")


@pytest.fixture
def two_files(tmp_path):
    """Two files of published kinds, with rows for several reports."""
    drawn = ["plain", "two", "broken", "one twice", "surplus", "no path", "other path"]
    for name, schema in (("fine", MANY), ("cauldron", SCHEMAS["The Cauldron"])):
        cases = [(CASES | LISTS)[case] for case in drawn]
        rows = [row_of(schema, "", images, [(q, a)]) for images, q, a, _ in cases]
        write_rows(tmp_path / "set" / f"{name}.parquet", schema, rows, row_group_size=3)
    return tmp_path


def test_the_same_files_give_the_same_bytes_with_any_number_of_workers(two_files, snapshot):
    for out, num_workers in (("one", 1), ("two", 4), ("one", 2)):
        options = {"num_workers": num_workers, "max_shard_bytes": 3000}
        pack_parquet([str(two_files / "set")], two_files / out, **options)
    assert snapshot(two_files / "one") == snapshot(two_files / "two")
    assert (two_files / "one" / "shard-00002.tar").is_file()


def test_the_corpus_does_not_depend_on_how_much_is_read_at_a_time(two_files, snapshot, monkeypatch):
    found = []
    for max_bytes in (1, 400, 10**6):
        monkeypatch.setattr(module, "BATCH_BYTES", max_bytes)
        pack_parquet([str(two_files / "set")], two_files / str(max_bytes))
        files = snapshot(two_files / str(max_bytes))
        found.append((json.loads(files.pop("report.json")), files))
        del files[".movekd-files.json"]  # the order of the reasons in report.json may differ
    assert found[0] == found[1] == found[2]


def test_an_interrupted_pack_is_run_again(two_files, snapshot):
    def interrupt(done, total):
        assert total == 14
        if done > 7:
            raise KeyboardInterrupt

    source = [str(two_files / "set")]
    with pytest.raises(KeyboardInterrupt):
        pack_parquet(source, two_files / "data", progress=interrupt)
    with pytest.raises(CorpusError, match="holds no index"):
        open_corpus(two_files / "data")
    pack_parquet(source, two_files / "data")
    pack_parquet(source, two_files / "whole")
    assert snapshot(two_files / "data") == snapshot(two_files / "whole")


def test_hopeless_input_is_refused_before_anything_is_written(two_files, snapshot):
    set_, data = two_files / "set", two_files / "data"
    write_rows(set_ / "index.parquet", pa.schema({"key": pa.string()}), [])
    with pytest.raises(ConfigError, match=r"index\.parquet has the columns key: string;"):
        pack_parquet([str(set_)], data)
    with pytest.raises(ConfigError, match="names no"):
        pack_parquet([str(two_files / "none")], data)
    assert not data.exists()
    rows = [row_of(ONE, "", [(BROKEN, None)], [("What?", "This.")])]
    path = write_rows(two_files / "bad.parquet", ONE, rows)
    match = r"no image can be used \(2 unreadable images\).*The first: bad\.parquet:0:0: "
    with pytest.raises(CorpusError, match=match):
        pack_parquet([str(path)], data)
    assert not data.exists()


def test_a_text_that_could_not_be_read_back_drops_its_row(two_files, monkeypatch):
    monkeypatch.setattr(module, "_MAX_TEXT_CHARACTERS", 20)
    texts = [("What?", "This."), ("What?", "T" * 16)]
    rows = [row_of(ONE, str(n), [(GOOD[n], None)], [pair]) for n, pair in enumerate(texts)]
    report = pack_parquet([str(write_rows(two_files / "a", ONE, rows))], two_files / "data")
    ((identity, reason),) = report.malformed_entries
    assert identity == "1"
    assert "row 1 has 21 characters; expected at most 20" in reason
