"""Every benchmark's figures are computed again, by its own rule, on the images that are drawn."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import llava_eval
from movekd.evaluate.benchmarks.pope_mme import score_mme, score_pope
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.registry import BENCHMARKS
from movekd.evaluate.intervals import resampled_sums
from movekd.evaluate.sample import compare

SUFFIX = "\nAnswer the question using a single word or phrase."
COUNTS = {"questions", "neither", "subtasks", "asked", "unread"}


def made_pope(folder, num_images=60):
    """POPE's questions about images of unequal difficulty, and the answers of two models."""
    rng = np.random.default_rng(0)
    questions, answers, others = [], [], []
    for kind in ("random", "popular", "adversarial"):
        lines = []
        for image in range(num_images):
            chance = np.random.default_rng(image).beta(4, 1)
            for thing in ("cat", "dog", "cup"):
                text, label = f"Is there a {thing}?", rng.random() < 0.5
                lines.append({"image": str(image), "text": text, "label": "yes" if label else "no"})
                questions.append(Question(len(questions), text + SUFFIX, str(image), kind))
                for given in (answers, others):
                    given.append("Yes" if label == (rng.random() < chance) else "No")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"coco_pope_{kind}.json").write_text(text)
    return questions, answers, others


def made_mme(folder, num_images=25):
    """MME's questions, their labels, and answers of which two thirds are right."""
    rng = np.random.default_rng(1)
    questions, answers = [], []
    for subtask in ("existence", "OCR", "code_reasoning"):
        (folder / subtask).mkdir(parents=True)
        for image in range(num_images):
            (folder / subtask / f"{image}.txt").write_text("Red?\tYes\nBlue?\tNo\n")
            for text, label in (("Red?", "Yes"), ("Blue?", "No")):
                name = f"{subtask}/{image}.png"
                questions.append(Question(name, text + SUFFIX, name, subtask))
                wrong = {"Yes": "No", "No": "Yes"}[label]
                answers.append(label if rng.random() < 0.67 else wrong)
    return questions, answers


def drawn(questions, answers, sample, times):
    """The questions about each image, as often as it is drawn."""
    of_image = defaultdict(list)
    for question, answer, image in zip(questions, answers, sample.images, strict=True):
        of_image[image].append((question, answer))
    pairs = [p for image, n in zip(of_image, times, strict=True) for p in of_image[image] * n]
    return [question for question, _ in pairs], [answer for _, answer in pairs]


def test_popes_figures_on_a_draw_are_those_of_the_drawn_questions(tmp_path):
    questions, answers, _ = made_pope(tmp_path)
    sample = score_pope(questions, answers, tmp_path).sample
    rng = np.random.default_rng(0)  # the seed of the intervals: their first draws
    sums = resampled_sums(sample.counts_IS, 3)
    for number in range(3):
        times = np.bincount(rng.integers(0, 60, 60), minlength=60)
        again = score_pope(*drawn(questions, answers, sample, times), tmp_path)
        found = sample.figures(sums[number : number + 1])
        for row, figures in again.rows.items():
            for name in figures.keys() - COUNTS:
                assert found[row][name][0] == pytest.approx(figures[name])


def test_popes_interval_is_wider_than_that_of_independent_questions(tmp_path):
    questions, answers, _ = made_pope(tmp_path)
    sample = score_pope(questions, answers, tmp_path).sample
    assert sample.num_images == 60
    low, high = sample.interval
    assert low < sample.rows()["mean"]["f1"] < high
    apart = type(sample)(range(len(questions)), sample.counts_QS, sample.figures, sample.headline)
    assert high - low > 1.2 * (apart.interval[1] - apart.interval[0])


def test_mmes_score_on_some_images_is_that_of_their_questions(tmp_path):
    questions, answers = made_mme(tmp_path)
    report = score_mme(questions, answers, tmp_path)
    sample, keep = report.sample, np.random.default_rng(2).random(75) < 0.6
    assert sample.num_images == 75
    images = dict(zip(sample.images, keep, strict=True))
    some = [
        pair
        for pair in zip(questions, answers, strict=True)
        if images[str(pair[0].id).removesuffix(".png")]
    ]
    again = score_mme([q for q, _ in some], [a for _, a in some], tmp_path)
    found = sample.figures(sample.counts_IS[keep].sum(0, keepdims=True))
    for row, figures in again.rows.items():
        for name in figures.keys() - COUNTS:
            assert found[row][name][0] == pytest.approx(figures[name])
    low, high = sample.interval
    assert low < report.value < high
    assert {"accuracy", "accuracy_plus", "score"} == sample.intervals["OCR"].keys()


def test_a_composite_is_compared_by_whole_images(tmp_path):
    questions, answers, others = made_pope(tmp_path)
    one, other = (score_pope(questions, given, tmp_path) for given in (answers, others))
    found = compare(one.sample, other.sample)
    assert found.test == "permutation of whole images"
    assert found.difference == pytest.approx(one.value - other.value)
    assert found.p > 0.01, "both models have the same chances"
    worse = ["Yes" if n % 3 == 0 else answer for n, answer in enumerate(answers)]
    assert compare(one.sample, score_pope(questions, worse, tmp_path).sample).p < 0.01


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_what_its_figures_are_computed_from(name, tmp_path, crops):
    options = llava_eval.write_benchmarks(tmp_path, crops)[name]
    truth = options.get("annotations") or options[{"mme": "images"}.get(name, "questions")]
    questions = BENCHMARKS[name].load(Path(options["questions"]))
    answers = [["yes", "No", "A", "3"][n % 4] for n in range(len(questions))]
    report = BENCHMARKS[name].score(questions, answers, Path(truth))
    sample = report.sample
    if name != "mme":  # its images are named by subtask and stem
        clusters = dict.fromkeys(question.cluster for question in questions)
        assert list(dict.fromkeys(sample.images)) == list(clusters)
    row, column = sample.headline
    assert sample.rows()[row][column] == report.value == report.rows[row][column]
    for name, figures in sample.rows().items():
        assert figures.items() <= report.rows[name].items()
        for figure, value in figures.items():
            low, high = sample.intervals[name][figure]
            assert low <= value <= high
            assert figure not in COUNTS


def test_copies_of_mmbench_and_questions_about_one_image_are_drawn_together():
    picture, other = "aGVsbG8=", "d29ybGQ="
    images = [Question(n, "?", embedded=picture if n < 3 else other) for n in range(4)]
    assert len({question.cluster for question in images}) == 2
    assert Question(1, "a", "x.jpg").cluster == Question(2, "b", "x.jpg").cluster
    assert Question(1, "a").cluster != Question(2, "a").cluster  # no image: by itself
