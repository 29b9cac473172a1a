"""Write easy-VQA as LLaVA's JSON: images of one coloured shape, captions and questions.

Input: the wheel of ``easy-vqa``. Output: ``images/``, ``pretrain.json`` (captions),
``finetune.json`` (four questions per image) and ``test.json`` (one question each, from the data
set's own test images). Used by ``demo_real``.

Source: Victor Zhou, easy-VQA, https://github.com/vzhou842/easy-VQA (MIT).
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from packages import read_member

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
TURNS = 2
"""Questions per image of the second stage."""

Asked = dict[int, list[tuple[str, str]]]
"""Number of an image -> its questions and answers."""


def write_corpus(
    wheel: Path, folder: Path, *, num_images: int, num_test: int, seed: int = 0
) -> None:
    """Write images and JSON files into ``folder``, drawn by ``seed``.

    Args:
        wheel: of ``easy-vqa``.
        folder: to write; files of the same names are replaced.
        num_images: training images: half have a caption, the others questions.
        num_test: test questions, at most one per image.
        seed: of the draw.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    train, test = (read_questions(wheel, split) for split in ("train", "test"))
    drawn = _draw(rng, [number for number in train if caption(train[number])], num_images)
    half = (len(drawn) + 1) // 2
    captions, questions = [], []
    for number in drawn[:half]:
        name = _write_image(wheel, folder, "train", number)
        captions.append(_entry(name, [("", str(caption(train[number])))]))
    for number in drawn[half:]:
        name = _write_image(wheel, folder, "train", number)
        asked = train[number]
        turns = [asked[at] for at in _draw(rng, list(range(len(asked))), TURNS)]
        questions.append(_entry(name, turns))
    asks = []
    for number in _draw(rng, list(test), num_test):
        turn = test[number][int(rng.integers(len(test[number])))]
        asks.append(_entry(_write_image(wheel, folder, "test", number), [turn]))
    for file, entries in (("pretrain", captions), ("finetune", questions), ("test", asks)):
        path = folder / f"{file}.json"
        path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def read_questions(wheel: Path, split: str) -> Asked:
    """Return the questions and answers of the images of a split, ``train`` or ``test``."""
    asked: Asked = defaultdict(list)
    for question, answer, number in json.loads(
        read_member(wheel, f"easy_vqa/data/{split}/questions.json")
    ):
        asked[number].append((question, answer))
    return dict(asked)


def caption(turns: list[tuple[str, str]]) -> str | None:
    """Return "a blue circle" from what the questions of an image tell, None if they do not."""
    answers = [answer for _, answer in turns]
    shape = next((answer for answer in answers if answer in SHAPES), None)
    colour = next((answer for answer in answers if answer in COLOURS), None)
    return f"a {colour} {shape}" if shape and colour else None


def _entry(image: str, turns: list[tuple[str, str]]) -> dict[str, object]:
    said = []
    for number, (question, answer) in enumerate(turns):
        text = question if number else f"<image>\n{question}".strip()
        said += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": image.removesuffix(".png"), "image": image, "conversations": said}


def _write_image(wheel: Path, folder: Path, split: str, number: int) -> str:
    name = f"{split}_{number:04d}.png"
    content = read_member(wheel, f"easy_vqa/data/{split}/images/{number}.png")
    (folder / "images" / name).write_bytes(content)
    return name


def _draw(rng: np.random.Generator, values: list[int], count: int) -> list[int]:
    return [int(v) for v in rng.choice(values, min(count, len(values)), replace=False)]
