"""Tests of movekd.corpus.pack: each entry of a LLaVA file is kept, or listed with its reason."""

import json
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus_files import check_sums, entry, pack
from movekd.corpus.conversations import load_conversations
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.errors import ConfigError


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
