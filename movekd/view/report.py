"""Write one HTML file about one training run: `movekd report`.

Input: a run's log and, optionally, questions for its model. Output: one file that opens from disk,
without scripts and without requests to the network.
"""

import base64
import datetime
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from movekd import __version__
from movekd.corpus.conversations import load_conversations
from movekd.corpus.decode import decode_image
from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.answers import ANSWERS_DIR
from movekd.evaluate.exact_match import normalise, split_questions
from movekd.evaluate.generate import generate_answers
from movekd.evaluate.image_folder import read_from_folder
from movekd.student.checkpoint import TrainedStudent
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
    folder = jinja2.PackageLoader("movekd.view", "templates")
    environment = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        name=run.directory.resolve().name,
        facts=_facts(run),
        figures=[(heading, to_svg(figure)) for heading, figure in run_figures(run)],
        answers=answers,
        teachers=run.teachers,
        distils=run.config.get("distill") is not None,
        config=yaml.safe_dump(dict(run.config), sort_keys=False),
        version=__version__,
        date=datetime.date.today().isoformat(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def ask_samples(
    trained: TrainedStudent, questions: Path, images: Path, number: int
) -> list[SampleAnswer]:
    """Return answers to questions spread evenly over a LLaVA-style file.

    Raises:
        ConfigError: the file holds no question with an answer.
        CorpusError: an image is missing.
    """
    asked, right = split_questions(load_conversations(questions))
    if not asked:
        raise ConfigError(f"{questions} holds no question; expected LLaVA's JSON.")
    number = min(number, len(asked))
    places = [at * len(asked) // number for at in range(number)]
    read = read_from_folder(images)
    given = generate_answers(
        trained.student,
        [asked[place] for place in places],
        read,
        prompt=trained.prompt,
        geometry=trained.geometry,
        batch_size=8,
    )
    return [
        SampleAnswer(
            asked[place].turns[-1][1].replace("<image>", "").strip(),
            answer,
            right[place],
            normalise(answer) == normalise(right[place]),
            thumbnail(read(asked[place].images[0])) if asked[place].images else None,
            questions.name,
        )
        for place, answer in zip(places, given, strict=True)
    ]


def stored_answers(directory: Path, number: int) -> list[SampleAnswer]:
    """Return the first stored answers of each benchmark that `movekd evaluate` ran."""
    found = []
    for path in sorted((directory / ANSWERS_DIR).glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for _, line in zip(range(number), lines, strict=False):
                try:
                    said: Mapping[str, Any] = json.loads(line)
                    found.append(
                        SampleAnswer(said["prompt"], said["text"], None, None, None, path.name)
                    )
                except (ValueError, KeyError, TypeError):
                    continue  # another process is writing this line
    return found


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
    student = config.get("student", {})
    facts = [
        ("state", "finished" if run.is_ended else "not finished: state of its last checkpoint"),
        ("stage", f"{config.get('stage')}, recipe {config.get('recipe')}"),
        ("steps", f"{last.get('step', 0):,.0f} ({last.get('epoch', 0):.2f} epochs)"),
        ("vision tower", str(student.get("vision_tower"))),
        ("language model", str(student.get("language_model"))),
    ]
    if run.is_ended:
        facts.append(("time", str(datetime.timedelta(seconds=round(run.ending["train_runtime"])))))
        facts.append(("samples per second", f"{run.ending['train_samples_per_second']:,.1f}"))
    return facts
