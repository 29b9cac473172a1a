"""Tests of movekd.corpus.conversations."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.corpus.conversations import (
    Conversation,
    RawEntry,
    iter_conversations,
    load_conversations,
    parse_conversation,
)
from movekd.errors import ConfigError

ENTRY = {
    "id": "7",
    "image": "coco/7.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}],
}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
conversations = st.builds(
    Conversation,
    id=text,
    images=st.lists(text.filter(bool), max_size=3).map(tuple),
    turns=st.lists(st.tuples(st.sampled_from(["human", "gpt"]), text), min_size=1).map(tuple),
    question_type=st.none() | text,
)


@settings(deadline=None)
@given(conversations)
def test_json_and_back_is_the_identity(conversation):
    line = conversation.to_json()
    assert "\n" not in line
    assert parse_conversation(json.loads(line), "here") == conversation


def test_an_array_and_lines_hold_the_same(tmp_path):
    entries = [ENTRY, {**ENTRY, "image": ["a", "b"]}, {**ENTRY, "image": None, "id": 3, "x": 1}]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(entries), encoding="utf-8")
    lines = "\n\n".join(json.dumps(entry) for entry in entries)
    (tmp_path / "b.jsonl").write_text(lines + "\n")
    loaded = load_conversations(tmp_path / "a.json")
    assert loaded == load_conversations(str(tmp_path / "b.jsonl"))
    assert [c.images for c in loaded] == [("coco/7.jpg",), ("a", "b"), ()]
    assert [c.id for c in loaded] == ["7", "7", "3"]
    assert loaded[0].turns[0] == ("human", "<image>\nWhat?")
    assert loaded[0].num_placeholders == 1


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(ENTRY) + "\nbroken\n")
    entries = iter_conversations(path)
    assert next(entries).id == "7"
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        next(entries)


def test_half_a_surrogate_pair_becomes_a_question_mark():
    entry = json.loads('{"id": "a", "conversations": [{"from": "gpt", "value": "x\\ud83d"}]}')
    assert parse_conversation(entry, "here").turns == (("gpt", "x?"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": []}, r"entry 1: id is a list of 0; expected a string"),
        ({"id": True}, r"id is true; expected"),
        ({"image": 5}, r"image is 5; expected a file name"),
        ({"image": ["a", ""]}, r'image is ""; expected'),
        ({"conversations": []}, r"conversations is a list of 0; expected a list of turns"),
        ({"conversations": ["hi"]}, r'entry 1, turn 0: the turn is "hi"; expected'),
        ({"conversations": [{"from": "Bob", "value": ""}]}, r'from is "Bob"; expected "human"'),
        ({"conversations": [{"role": "Bob", "content": ""}]}, r'role is "Bob"; expected "human"'),
        ({"conversations": [{"from": "system", "value": "x"}]}, r"expected a human turn behind"),
        ({"images": ["b"]}, r"images is a list of 1; expected the same as under image"),
        ({"image": ""}, r'image is ""; expected a file name'),
        ({"video": "a.mp4"}, r'video is "a.mp4"; expected images under image, and no other'),
        ({"conversations": [{"from": ["x"], "value": ""}]}, r"from is a list of 1; expected"),
        ({"conversations": [{"from": "gpt"}]}, r"value is missing or null; expected a string"),
        ({"question_type": 3}, r"question_type is 3; expected a string"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([ENTRY, {**ENTRY, **change}]))
    with pytest.raises(ConfigError, match=message):
        load_conversations(path)


def test_all_malformed_entries_are_counted_in_one_short_error(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([ENTRY, *[{**ENTRY, "image": 5}] * 70, ENTRY]))
    with pytest.raises(ConfigError) as raised:
        load_conversations(path)
    message = str(raised.value)
    assert f"{path}: entry 1: image is 5; expected a file name" in message
    assert f"70 entries of {path} are malformed, also 2, 3, 4, ...;" in message
    assert len(message) < 2000


def test_entries_of_llava_onevision_are_understood(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A"},
        {"from": "system", "value": " "},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "B"},
    ]
    entries = [
        {"sample_id": 5, "images": ["a.jpg"], "conversations": turns},
        {"id": None, "image": "a.jpg", "images": ["a.jpg"], "conversations": turns[1:3]},
        {"id": float("nan"), "conversations": turns[-2:]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    loaded = load_conversations(tmp_path / "a.json")
    assert [(c.id, c.images) for c in loaded] == [("5", ("a.jpg",)), ("1", ("a.jpg",)), ("2", ())]
    assert loaded[0].turns == (
        *(("human", "Be brief.\n\n<image>\nWhat?"), ("gpt", "A"), ("human", "Why?")),
        ("gpt", "B"),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b'{"id": 1}', "holds an object of 1; expected an array"),
        (b"[3]", "entry 0: the entry is 3; expected an object"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 5000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_llava_file_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_conversations(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; expected LLaVA"):
        load_conversations(tmp_path / "no.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_conversations(tmp_path)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
words = st.sampled_from(["human", "gpt", "system", "user", "assistant", "a.jpg", "<image>", ""])
names = st.sampled_from(
    [
        *("id", "sample_id", "image", "images", "conversations", "from", "value", "role"),
        *("content", "video", "img", "question_type", "", "猫"),
    ]
)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(values)
def test_any_json_value_is_a_conversation_or_one_short_error(value):
    for entry in (value, {**ENTRY, "image": value}, {**ENTRY, "conversations": value}):
        raw = RawEntry(3, "here", json.loads(json.dumps(entry)))
        assert isinstance(raw.id, str)
        message = "here"
        try:
            conversation = raw.parse()
            again = parse_conversation(json.loads(conversation.to_json()), "there")
            assert again == conversation
        except ConfigError as error:
            message = str(error)
        assert "here" in message
        assert len(message) < 2000
