"""Compose scenes of real handwriting, and write them as images and LLaVA JSON.

Input: the 1,797 scans of ``sklearn.datasets.load_digits`` (8x8), split by instance, so that no
training scan appears in a test scene. Output: 48x48 scenes of 2 to 4 digits in 2x2 cells, with
clutter and noise, as ``images/*.png``; ``pretrain.json`` (captions), ``finetune.json`` (several
questions per image), ``val.json`` and ``test.json`` (one question per entry, its type under
``question_type``). ``movekd demo`` calls :func:`write_corpus`; ``pretrain.py`` trains the teachers
on new training scenes and their ground truth.

    python pipelines/digits/scenes.py --output DIR

Dimensions: B scenes, C the four cells (row by row), H and W pixels, G grid side, S pixels of a
cell's side.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drawing import SIZE, Floats, background, clutter, join_cells, place

Split = Literal["train", "val", "test"]
Part = Literal["pretrain", "finetune", "val", "test"]
Question = tuple[str, str, str]
"""Type, question, answer."""
Ints = NDArray[np.int64]

EMPTY = -1  # a cell without a digit
NUM_CLASSES = 11  # grid labels: the ten digits, and 10 for no digit
PLACES = ("top left", "top right", "bottom left", "bottom right")
QUESTION_TYPES = ("where", "exists", "sum", "largest")

SPLIT_SEED = 0  # the shipped teachers were trained on the training scans of this split
SHARES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.6),
    "val": (0.6, 0.75),
    "test": (0.75, 1.0),
}  # shares of each digit's shuffled scans
PARTS: dict[Part, tuple[int, Split, int]] = {
    "pretrain": (0, "train", 0),
    "finetune": (1, "train", 4),
    "val": (2, "val", 1),
    "test": (3, "test", 1),
}  # number of the random stream, split of the handwriting, questions per scene
MIN_PATCH_INK = 0.12  # a patch with more mean ink counts as covered by its digit


@dataclass(frozen=True)
class Look:
    """What a scene has beside its digits.

    Attributes:
        strokes: most clutter strokes.
        noise: range of the standard deviation of a scene's pixel noise; white is 1.
    """

    strokes: int = 5
    noise: tuple[float, float] = (0.02, 0.1)


PLAIN = Look()
LOOKS = {"plain": PLAIN, "clutter": Look(strokes=12), "noise": Look(noise=(0.15, 0.25))}
"""The look of every scene that somebody learns from, and two that nobody has seen."""


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes and their ground truth.

    Attributes:
        images_BHW: grey images, uint8.
        digits_BC: the digit in each cell, int64; ``EMPTY`` without one.
        ink_BHW: share of each pixel that a digit's stroke covers, before clutter, contrast and
            noise; float32 in 0..1.
        scans_BC: index of each cell's scan in ``load_digits``; ``EMPTY`` without one.
    """

    images_BHW: NDArray[np.uint8]
    digits_BC: Ints
    ink_BHW: Floats
    scans_BC: Ints

    def __len__(self) -> int:
        return len(self.images_BHW)


@cache
def load_scans() -> tuple[Floats, Ints]:
    """Return all scans, float32 in 0..1 of shape (1797, 8, 8), and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.float32) / 16, data.target.astype(np.int64)


@cache
def split_scans(split: Split, split_seed: int = SPLIT_SEED) -> tuple[Ints, ...]:
    """Return, for each digit, the indices of the scans that ``split`` may use.

    The split is stratified and does not depend on the corpus seed: teachers of the same
    ``split_seed`` have never seen the test scans. The shipped teachers have the default.
    """
    _, labels = load_scans()
    rng = np.random.default_rng(split_seed)
    first, last = SHARES[split]
    chosen = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        chosen.append(order[round(first * len(order)) : round(last * len(order))])
    return tuple(chosen)


def draw_digits(num_scenes: int, rng: np.random.Generator, topic: str = "any") -> Ints:
    """Return digits_BC: 2 to 4 digits in random cells of each scene.

    The digits are uniform. If ``topic`` is ``largest``, the largest digit is uniform instead:
    with uniform digits it would be 9 in more than a quarter of the scenes.
    """
    caps_B = rng.integers(0, 10, num_scenes) if topic == "largest" else np.full(num_scenes, 9)
    digits_BC = rng.integers(0, caps_B[:, None] + 1, (num_scenes, 4))
    rank_BC = rng.random((num_scenes, 4)).argsort(1).argsort(1)  # random order of the cells
    if topic == "largest":
        digits_BC[rank_BC == 0] = caps_B
    num_digits_B = rng.integers(2, 5, num_scenes)
    digits_BC[rank_BC >= num_digits_B[:, None]] = EMPTY
    return digits_BC


def compose(
    digits_BC: Ints,
    split: Split,
    rng: np.random.Generator,
    split_seed: int = SPLIT_SEED,
    look: Look = PLAIN,
) -> Scenes:
    """Return scenes that show ``digits_BC`` in the handwriting of ``split``.

    Scan, size, place inside the cell and contrast are drawn per digit; background, clutter strokes
    and noise per scene.
    """
    num_scenes = len(digits_BC)
    scans, _ = load_scans()
    pools = split_scans(split, split_seed)
    counts = np.array([len(pool) for pool in pools])
    starts = np.concatenate([[0], counts.cumsum()[:-1]])
    picks_BC = starts[digits_BC] + (rng.random((num_scenes, 4)) * counts[digits_BC]).astype(int)
    scans_BC = np.where(digits_BC == EMPTY, EMPTY, np.concatenate(pools)[picks_BC])

    ink_BCSS = place(scans[scans_BC], rng) * (digits_BC != EMPTY)[..., None, None]
    contrast_BC11 = rng.uniform(0.3, 0.7, (num_scenes, 4, 1, 1)).astype(np.float32)
    images_BHW = background(num_scenes, rng)
    images_BHW += join_cells(ink_BCSS * contrast_BC11)
    images_BHW = np.maximum(images_BHW, clutter(num_scenes, rng, look.strokes))
    sigma_B11 = rng.uniform(*look.noise, (num_scenes, 1, 1)).astype(np.float32)
    images_BHW += sigma_B11 * rng.standard_normal(images_BHW.shape, dtype=np.float32)
    return Scenes(
        images_BHW=(images_BHW.clip(0, 1) * 255).round().astype(np.uint8),
        digits_BC=digits_BC,
        ink_BHW=join_cells(ink_BCSS),
        scans_BC=scans_BC,
    )


def grid_labels(scenes: Scenes, side: int = 6) -> Ints:
    """Return labels_BGG: the digit that covers each patch of a ``side`` x ``side`` grid, or 10.

    ``side`` must divide 48 and be even, so that no patch lies in two cells.
    """
    patch = SIZE // side
    cover_BGG = scenes.ink_BHW.reshape(-1, side, patch, side, patch).mean((2, 4))
    digits_BGG = scenes.digits_BC.reshape(-1, 2, 2).repeat(side // 2, 1).repeat(side // 2, 2)
    return np.where(cover_BGG > MIN_PATCH_INK, digits_BGG, NUM_CLASSES - 1)


def caption(digits_C: Ints) -> str:
    """Return the caption of a scene: ``a 7 at the top left, a 3 at the bottom right.``"""
    there = [f"a {d} at the {p}" for d, p in zip(digits_C, PLACES, strict=True) if d != EMPTY]
    return ", ".join(there) + "."


def ask(question_type: str, digits_C: Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question of a type about a scene, and its answer."""
    present = digits_C[digits_C != EMPTY]
    if question_type == "where":
        cell = int(rng.choice(np.flatnonzero(digits_C != EMPTY)))
        return f"Which digit is at the {PLACES[cell]}?", str(digits_C[cell])
    if question_type == "exists":
        is_there = rng.random() < 0.5
        pool = np.unique(present) if is_there else np.setdiff1d(np.arange(10), present)
        return f"Is there a {rng.choice(pool)}?", "yes" if is_there else "no"
    if question_type == "sum":
        return "What is the sum of the digits?", str(present.sum())
    return "What is the largest digit?", str(present.max())


def draw_questions(
    num_scenes: int, rng: np.random.Generator, turns: int
) -> tuple[Ints, list[list[Question]]]:
    """Return digits_BC, and for each scene ``turns`` questions as (type, question, answer).

    The type of the first question cycles through the four types. ``largest`` is only asked as a
    first question, about digits drawn for it. So a constant answer per type is rarely right.
    """
    topics = [QUESTION_TYPES[i % 4] for i in range(num_scenes)]
    plain_BC = draw_digits(num_scenes, rng)
    largest_BC = draw_digits(num_scenes, rng, "largest")
    is_largest_B = np.array([topic == "largest" for topic in topics])
    digits_BC = np.where(is_largest_B[:, None], largest_BC, plain_BC)
    questions = []
    for topic, digits_C in zip(topics, digits_BC, strict=True):
        others = ["where", "sum"] if topic == "largest" else ["where", "exists", "sum"]
        kinds = [topic, *(others[i % len(others)] for i in range(turns))]
        kinds = list(dict.fromkeys(kinds))[:turns]
        kinds += ["where"] * (turns - len(kinds))
        questions.append([(kind, *ask(kind, digits_C, rng)) for kind in kinds])
    return digits_BC, questions


def majority_accuracy(entries: list[dict[str, Any]]) -> float:
    """Return the accuracy of answering each question type with its most frequent answer."""
    answers: dict[str, list[str]] = {}
    for entry in entries:
        answers.setdefault(entry["question_type"], []).append(entry["conversations"][1]["value"])
    right = sum(max(map(given.count, set(given))) for given in answers.values())
    return right / len(entries)


def draw_part(
    name: Part,
    num_scenes: int,
    seed: int,
    split_seed: int = SPLIT_SEED,
    look: Look = PLAIN,
) -> Iterator[tuple[Scenes, list[list[Question]]]]:
    """Yield a part of the corpus, up to 256 scenes at a time, with the questions of each scene.

    The same arguments yield the same scenes, so the ground truth of a written corpus is drawn again
    instead of stored.
    """
    number, split, turns = PARTS[name]
    rng = np.random.default_rng([seed, number])
    if turns:
        digits_BC, questions = draw_questions(num_scenes, rng, turns)
    else:
        digits_BC, questions = draw_digits(num_scenes, rng), [[]] * num_scenes
    for first in range(0, num_scenes, 256):  # limits memory
        rows = slice(first, first + 256)
        yield compose(digits_BC[rows], split, rng, split_seed, look), questions[rows]


def write_corpus(
    out: Path,
    num_pretrain: int = 4096,
    num_finetune: int = 2048,
    num_val: int = 512,
    num_test: int = 512,
    seed: int = 0,
    split_seed: int = SPLIT_SEED,
    look: Look = PLAIN,
) -> dict[str, float]:
    """Write the corpus below ``out`` and return its figures.

    Image paths in the JSON files are relative to ``out/images``. The same arguments write the same
    bytes. A part without scenes has no file.

    Returns:
        The number of scenes of each file; ``majority_val`` and ``majority_test``: the accuracy of
        the most frequent answer per question type.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    sizes: dict[Part, int] = {
        "pretrain": num_pretrain,
        "finetune": num_finetune,
        "val": num_val,
        "test": num_test,
    }
    for name, num_scenes in sizes.items():
        if num_scenes == 0:
            continue
        is_single = PARTS[name][2] == 1
        entries: list[dict[str, Any]] = []
        for scenes, questions in draw_part(name, num_scenes, seed, split_seed, look):
            for image_HW, digits_C, asked in zip(
                scenes.images_BHW, scenes.digits_BC, questions, strict=True
            ):
                image = f"{name}_{len(entries):05d}.png"
                _save(image_HW, out / "images" / image)
                entries.append(_entry(image, digits_C, asked, is_single=is_single))
        (out / f"{name}.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        figures[name] = num_scenes
        if is_single:
            figures[f"majority_{name}"] = majority_accuracy(entries)
    return figures


def write_single_digits(
    out: Path, num_scenes: int, seed: int, split_seed: int = SPLIT_SEED
) -> None:
    """Write scenes of one digit each as ``out/train|test/DIGIT/*.png``: a task for a classifier.

    Those of ``train`` are in training handwriting, those of ``test`` in test handwriting,
    ``num_scenes`` of each. Digits take turns.
    """
    splits: tuple[Split, ...] = ("train", "test")
    for number, split in enumerate(splits):
        rng = np.random.default_rng([seed, len(PARTS) + number])
        digits_BC = np.full((num_scenes, 4), EMPTY)
        digits_BC[range(num_scenes), rng.integers(0, 4, num_scenes)] = np.arange(num_scenes) % 10
        drawn = compose(digits_BC, split, rng, split_seed)
        for i, image_HW in enumerate(drawn.images_BHW):
            folder = out / split / str(i % 10)
            folder.mkdir(parents=True, exist_ok=True)
            _save(image_HW, folder / f"{i:05d}.png")


def _save(image_HW: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(image_HW).convert("RGB").save(path, compress_level=1)


def _entry(
    image: str, digits_C: Ints, questions: list[Question], is_single: bool
) -> dict[str, Any]:
    """Return a LLaVA entry: a caption, or the turns of a conversation."""
    turns = [(q, a) for _, q, a in questions] or [("", caption(digits_C))]
    conversations = []
    for i, (question, answer) in enumerate(turns):
        asked = f"<image>\n{question}".strip() if i == 0 else question
        conversations += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    entry = {"id": image.removesuffix(".png"), "image": image, "conversations": conversations}
    return {**entry, "question_type": questions[0][0]} if is_single else entry


def main() -> None:
    """Parse the command line, write the corpus, print its figures."""
    parser = argparse.ArgumentParser(description="Write the scenes of the embedded corpus.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train-pretrain", type=int, default=4096)
    parser.add_argument("--train-finetune", type=int, default=2048)
    parser.add_argument("--val", type=int, default=512)
    parser.add_argument("--test", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    figures = write_corpus(
        args.output, args.train_pretrain, args.train_finetune, args.val, args.test, args.seed
    )
    for name, value in figures.items():
        print(f"{name:14s} {value:.3f}" if name.startswith("majority") else f"{name:14s} {value}")


if __name__ == "__main__":
    main()
