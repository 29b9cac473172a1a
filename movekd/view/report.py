"""Write one HTML file about one training run: `movekd report`.

Input: a run's log and, optionally, questions for its model. Output: one file that opens from disk,
without scripts and without requests to the network.
"""

import base64
import datetime
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from movekd.corpus.conversations import IMAGE_PLACEHOLDER
from movekd.corpus.decode import decode_image
from movekd.errors import ConfigError, shorten
from movekd.evaluate.benchmarks.answers import ANSWERS_DIR
from movekd.evaluate.benchmarks.json_files import read_lines
from movekd.evaluate.exact_match import normalise
from movekd.evaluate.generate import generate_answers
from movekd.evaluate.image_folder import Progress, check_images, read_from_folder
from movekd.evaluate.question_file import load_questions
from movekd.student.checkpoint import TrainedStudent
from movekd.train.step_losses import MAX_OVER_MEDIAN
from movekd.view.page import write_page
from movekd.view.plots import run_figures, to_svg
from movekd.view.run_log import RunLog

_THUMBNAIL = 160


@dataclass(frozen=True)
class SampleAnswer:
    """A question, the model's answer and the right one.

    Attributes:
        question: the question.
        answer: the model's answer.
        right: the right answer; None if unknown.
        is_right: whether they match exactly; None if unknown.
        image: a ``data:`` URL of a thumbnail; None without an image.
        source: file of the question.
    """

    question: str
    answer: str
    right: str | None
    is_right: bool | None
    image: str | None
    source: str


def write_report(run: RunLog, answers: Sequence[SampleAnswer], path: Path) -> None:
    """Write the report of a run; it replaces the file at ``path`` atomically."""
    write_page(
        path,
        "report.html.j2",
        name=run.directory.resolve().name,
        left_out=run.left_out,
        facts=_facts(run),
        figures=[(heading, to_svg(figure)) for heading, figure in run_figures(run)],
        answers=answers,
        teachers=run.teachers,
        distils=run.config.get("distill") is not None,
        config=yaml.safe_dump(dict(run.config), sort_keys=False),
    )


def ask_samples(
    load: Callable[[], TrainedStudent],
    questions: Path,
    images: Path,
    number: int,
    progress: Progress = lambda what, done, total: None,
) -> list[SampleAnswer]:
    """Return answers to questions spread evenly over a LLaVA-style file.

    Args:
        load: loads the model, after the images were checked.
        questions: the file.
        images: folder of its images.
        number: how many questions.
        progress: called while images are checked.

    Raises:
        ConfigError: the file holds no question with an answer.
        CorpusError: an image is missing or cannot be decoded.
    """
    every = load_questions(questions)
    number = min(number, len(every))
    chosen = [every[at * len(every) // number] for at in range(number)]
    read = read_from_folder(images)
    names = dict.fromkeys(name for question in chosen for name in question.conversation.images)
    check_images({name: partial(read, name) for name in names}, progress)
    trained = load()
    given = generate_answers(
        trained.student,
        [question.conversation for question in chosen],
        read,
        prompt=trained.prompt,
        geometry=trained.geometry,
        batch_size=8,
    )
    return [
        SampleAnswer(
            question.line.prompt.replace(IMAGE_PLACEHOLDER, "").strip(),
            answer,
            question.right,
            normalise(answer) == normalise(question.right),
            thumbnail(read(question.conversation.images[0]))
            if question.conversation.images
            else None,
            questions.name,
        )
        for question, answer in zip(chosen, given, strict=True)
    ]


def stored_answers(directory: Path, number: int) -> tuple[list[SampleAnswer], list[str]]:
    """Return the first stored answers of each benchmark that `movekd evaluate` ran.

    Returns:
        The answers, and which files were left out, in words.
    """
    found, left_out = [], []
    for path in sorted((directory / ANSWERS_DIR).glob("*.jsonl")):
        try:
            lines = read_lines(path, "LLaVA's answers", is_torn_ok=True)
            for _, said in lines[:number]:
                question, text = said.get("prompt"), said.get("text")
                if not isinstance(question, str) or not isinstance(text, str):
                    raise ConfigError(f"{path} has a line without prompt and text.")
                found.append(SampleAnswer(question, text, None, None, None, path.name))
        except ConfigError as error:
            left_out.append(f"{ANSWERS_DIR}/{shorten(path.name)}: {shorten(error)}")
    return found, left_out


def thumbnail(data: bytes) -> str:
    """Return an image as a ``data:`` URL of a small JPEG.

    Raises:
        UnreadableImageError: the image cannot be decoded.
    """
    image = decode_image(data)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _facts(run: RunLog) -> list[tuple[str, str]]:
    """Return the labels and values at the top of the report."""
    config, last = run.config, run.steps[-1] if run.steps else {}
    student = config.get("student")
    if not isinstance(student, dict):
        student = {}
    facts = [
        ("state", "finished" if run.is_ended else "not finished: state of its last checkpoint"),
        ("stage", f"{shorten(config.get('stage'))}, recipe {shorten(config.get('recipe'))}"),
        ("steps", f"{last.get('step', 0):,.0f} ({last.get('epoch', 0):.2f} epochs)"),
        ("vision tower", shorten(student.get("vision_tower"))),
        ("language model", shorten(student.get("language_model"))),
    ]
    if held_out := [e for e in run.evaluations if not math.isnan(e.get("eval_loss", math.nan))]:
        best = min(held_out, key=lambda entry: entry["eval_loss"])
        said = f"{best['eval_loss']:.4g} at step {best['step']:,.0f}, the smallest"
        last_one = held_out[-1]
        if last_one is not best:
            said += f"; {last_one['eval_loss']:.4g} at step {last_one['step']:,.0f}, the last"
        facts.append(("held-out loss", said))
    peaks = {n: r for n, r in run.ending.items() if n.startswith(MAX_OVER_MEDIAN)}
    if peaks:
        said = ", ".join(f"{n.removeprefix(MAX_OVER_MEDIAN)} {r:.3g}" for n, r in peaks.items())
        facts.append(("KD loss, largest over median step", f"{said}; second half of the run"))
    if run.is_ended:
        facts.append(("time", str(datetime.timedelta(seconds=round(run.ending["train_runtime"])))))
        rate = run.ending.get("train_samples_per_second")
        facts.append(("samples per second", "-" if rate is None else f"{rate:,.1f}"))
    if run.num_not_finite:
        what = f"{run.num_not_finite:,} logged values: NaN, infinite or above 1e30; gaps in curves"
        facts.append(("not finite", what))
    return facts
