"""Measure a trained student: its answers to a world's questions, and a probe of its encoder."""

from pathlib import Path

from movekd.corpus.conversations import load_conversations
from movekd.evaluate.encoder.encoders import load_encoder
from movekd.evaluate.encoder.labelled_images import read_labelled_images
from movekd.evaluate.encoder.probed_model import ProbedModel
from movekd.evaluate.encoder.run import run_probe
from movekd.evaluate.exact_match import exact_match, split_questions
from movekd.evaluate.generate import generate_answers
from movekd.evaluate.image_folder import read_from_folder
from movekd.student.checkpoint import TrainedStudent


def answer(trained: TrainedStudent, folder: Path, part: str) -> dict[str, list[int]]:
    """Answer the questions of ``folder/part.json``; return [right, asked] per question type."""
    asked, right = split_questions(load_conversations(folder / f"{part}.json"))
    given = generate_answers(
        trained.student,
        asked,
        read_from_folder(folder / "images"),
        prompt=trained.prompt,
        geometry=trained.geometry,
        batch_size=128,
        max_new_tokens=4,
    )
    scores = exact_match(asked, right, list(given))
    return {name: [score.correct, score.total] for name, score in scores.items()}


def probe(run: Path, images: Path) -> dict[str, list[int]]:
    """Return [right, asked] of each probe of a run's encoder, such as ``linear cls``."""

    def silent(what: str, done: int, total: int) -> None:
        pass

    def load(name: str) -> ProbedModel:
        return load_encoder(name)

    found = read_labelled_images(images, silent)
    scores = run_probe([str(run)], load, found, features=None, progress=silent)
    asked = len(found.test)
    return {f"{s.probe} {s.feature}": [round(s.accuracy * asked), asked] for s in scores}
