"""The embedded corpus is deterministic and split by instance, and its answers are right."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scenes

SIZES = {"num_pretrain": 24, "num_finetune": 24, "num_val": 24, "num_test": 24}


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _answer(question: str, digits: dict[str, int]) -> str:
    """Answer a question about `place -> digit`, by other means than scenes.ask."""
    if match := re.fullmatch(r"Which digit is at the (.*)\?", question):
        return str(digits[match[1]])
    if match := re.fullmatch(r"Is there a (\d)\?", question):
        return "yes" if int(match[1]) in digits.values() else "no"
    if question == "What is the sum of the digits?":
        return str(sum(digits.values()))
    assert question == "What is the largest digit?"
    return str(sorted(digits.values())[-1])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(folder, **SIZES)
    return folder


def test_the_same_seed_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    scenes.write_corpus(tmp_path / "again", **SIZES)
    scenes.write_corpus(tmp_path / "other", **SIZES, seed=1)
    assert _hashes(tmp_path / "again") == _hashes(corpus)
    assert _hashes(tmp_path / "other").keys() == _hashes(corpus).keys()
    assert not set(_hashes(tmp_path / "other").values()) & set(_hashes(corpus).values())


def test_no_scan_is_in_two_splits_and_none_is_lost() -> None:
    used = [np.concatenate(scenes.split_scans(split)) for split in scenes.SHARES]
    assert sorted(np.concatenate(used)) == list(range(1797))
    _, labels = scenes.load_scans()
    for split in scenes.SHARES:
        for digit, scans in enumerate(scenes.split_scans(split)):
            assert set(labels[scans]) == {digit}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_scenes_use_scans_of_their_split_and_digit(split: scenes.Split) -> None:
    rng = np.random.default_rng(3)
    batch = scenes.compose(scenes.draw_digits(64, rng), split, rng)
    assert set(batch.scans_BC.ravel()) <= {*np.concatenate(scenes.split_scans(split)), -1}
    _, labels = scenes.load_scans()
    filled = batch.digits_BC != scenes.EMPTY
    assert (labels[batch.scans_BC[filled]] == batch.digits_BC[filled]).all()
    assert (batch.scans_BC[~filled] == scenes.EMPTY).all()
    assert set(filled.sum(1)) == {2, 3, 4}


def test_ink_lies_in_the_filled_cells_alone_and_the_grid_labels_say_so() -> None:
    rng = np.random.default_rng(4)
    batch = scenes.compose(scenes.draw_digits(64, rng), "train", rng)
    labels_BGG = scenes.grid_labels(batch)
    assert batch.ink_BHW.min() >= 0
    assert batch.ink_BHW.max() <= 1 + 1e-6
    for ink_HW, labels_GG, digits_C in zip(batch.ink_BHW, labels_BGG, batch.digits_BC, strict=True):
        for cell, digit in enumerate(digits_C):
            y, x = divmod(cell, 2)
            ink = ink_HW[24 * y : 24 * y + 24, 24 * x : 24 * x + 24]
            labels = set(labels_GG[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].ravel())
            assert (ink.sum() > 0) == (digit != scenes.EMPTY)
            assert labels - {10} == ({digit} - {scenes.EMPTY})


def test_images_are_grey_rgb_of_48_pixels_and_not_flat(corpus: Path) -> None:
    paths = sorted((corpus / "images").iterdir())
    assert len(paths) == sum(SIZES.values())
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image)
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))
        assert (pixels == pixels[..., :1]).all()
        assert pixels.std() > 4


@pytest.mark.parametrize("part", ["finetune", "val", "test"])
def test_answers_agree_with_the_digits_that_were_drawn(part: str) -> None:
    number = ["pretrain", "finetune", "val", "test"].index(part)
    turns = 4 if part == "finetune" else 1
    digits_BC, questions = scenes.draw_questions(200, np.random.default_rng([0, number]), turns)
    for digits_C, asked in zip(digits_BC, questions, strict=True):
        places = dict(zip(scenes.PLACES, digits_C.tolist(), strict=True))
        digits = {place: digit for place, digit in places.items() if digit != scenes.EMPTY}
        assert len(asked) == turns
        for _, question, answer in asked:
            assert answer == _answer(question, digits)
        caption = re.findall(r"a (\d) at the (\w+ \w+)[,.]", scenes.caption(digits_C))
        assert {place: int(digit) for digit, place in caption} == digits


def test_json_is_llava(corpus: Path) -> None:
    for part in ("pretrain", "finetune", "val", "test"):
        entries: list[dict[str, Any]] = json.loads((corpus / f"{part}.json").read_text())
        assert len(entries) == 24
        for entry in entries:
            turns = entry["conversations"]
            assert (corpus / "images" / entry["image"]).is_file()
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>")
            assert sum(turn["value"].count("<image>") for turn in turns) == 1
            assert len(turns) == (8 if part == "finetune" else 2)
            assert ("question_type" in entry) == (part in ("val", "test"))
            assert entry.get("question_type", "sum") in scenes.QUESTION_TYPES
            assert all(turn["value"] for turn in turns)


def test_guessing_is_poor() -> None:
    digits_BC, questions = scenes.draw_questions(4000, np.random.default_rng(7), 1)
    entries: list[dict[str, Any]] = [
        {"question_type": kind, "conversations": [{}, {"value": answer}]}
        for [(kind, _, answer)] in questions
    ]
    assert Counter(entry["question_type"] for entry in entries) == dict.fromkeys(
        scenes.QUESTION_TYPES, 1000
    )
    yes = Counter(a for [(kind, _, a)] in questions if kind == "exists")["yes"]
    assert abs(yes - 500) < 80  # five standard deviations
    assert scenes.majority_accuracy(entries) < 0.23
    assert len(digits_BC) == 4000
