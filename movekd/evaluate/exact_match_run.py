"""Ask the questions of a LLaVA-style file, store the answers, score them: `movekd evaluate`.

Input: a model, a question file, a folder of images. Output: scores, and an answers file that a
second call resumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from movekd.evaluate.benchmarks.answers import AnswerProvenance, open_answers
from movekd.evaluate.exact_match import Score, exact_match
from movekd.evaluate.image_folder import Progress, check_images, read_from_folder
from movekd.evaluate.question_file import load_questions

if TYPE_CHECKING:  # scoring stored answers loads no torch
    from movekd.student.checkpoint import TrainedStudent


@dataclass(frozen=True)
class ExactMatchRun:
    """One evaluation by exact match.

    Attributes:
        run: output of `movekd train` or `import`, or an export of format hf.
        questions: LLaVA-style file whose last turns are the right answers.
        images: folder of its images.
        answers: answers file; None keeps them in memory.
        batch_size: questions per batch.
        max_new_tokens: maximum new tokens per answer.
    """

    run: Path
    questions: Path
    images: Path
    answers: Path | None = None
    batch_size: int = 32
    max_new_tokens: int = 32


@dataclass(frozen=True)
class ExactMatchOutcome:
    """Scores per question type and of ``all``, and how many questions were asked now."""

    scores: dict[str, Score]
    num_questions: int
    num_asked: int


def run_exact_match(
    todo: ExactMatchRun, load: "Callable[[], TrainedStudent]", progress: Progress
) -> ExactMatchOutcome:
    """Check the images, ask the questions without an answer, and score all.

    Args:
        todo: the evaluation.
        load: loads the model; not called if every question has an answer.
        progress: called with a label, the done and all images or questions.

    Raises:
        MovekdError: entries cannot be asked, images cannot be used, or the answers file belongs to
            another model, question file or number of tokens.
    """
    asked = load_questions(todo.questions)
    lines = [question.line for question in asked]
    read = read_from_folder(todo.images)
    given: dict[tuple[str, str], str] = {}

    def ask(open_keys: set[tuple[str, str]], keep: Callable[[int, str], None]) -> None:
        places = [at for at, line in enumerate(lines) if line.key in open_keys]
        if not places:
            return
        names = dict.fromkeys(name for at in places for name in asked[at].conversation.images)
        check_images({name: partial(read, name) for name in names}, progress)
        from movekd.evaluate.generate import generate_answers

        trained = load()
        answers = generate_answers(
            trained.student,
            [asked[at].conversation for at in places],
            read,
            prompt=trained.prompt,
            geometry=trained.geometry,
            batch_size=todo.batch_size,
            max_new_tokens=todo.max_new_tokens,
        )
        before = len(lines) - len(places)
        for done, (at, text) in enumerate(zip(places, answers, strict=True), start=1):
            keep(at, text)
            progress("evaluate", before + done, len(lines))

    if todo.answers is None:
        ask({line.key for line in lines}, lambda at, text: given.update({lines[at].key: text}))
        num_asked, texts = len(lines), [given[line.key] for line in lines]
    else:
        origin = AnswerProvenance.of(todo.run, todo.questions, todo.max_new_tokens)
        with open_answers(todo.answers, lines, origin, take_parts=False) as stored:
            open_keys = {line.key for line in stored.open_questions(lines)}
            ask(open_keys, lambda at, text: stored.add(lines[at], text))
            num_asked, texts = len(open_keys), stored.texts(lines)
    scores = exact_match(
        [question.conversation for question in asked], [q.right for q in asked], texts
    )
    return ExactMatchOutcome(scores, len(lines), num_asked)
