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
from movekd.evaluate.benchmarks.baseline import Baseline, read_baseline
from movekd.evaluate.exact_match import Score, exact_match, exact_match_sample
from movekd.evaluate.image_folder import Progress, check_images, read_from_folder
from movekd.evaluate.intervals import Interval
from movekd.evaluate.question_file import load_questions
from movekd.evaluate.sample import Comparison, Sample, compare, describe

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
        baseline: answers file of a second model, to compare with.
    """

    run: Path
    questions: Path
    images: Path
    answers: Path | None = None
    batch_size: int = 32
    max_new_tokens: int = 32
    baseline: Path | None = None


@dataclass(frozen=True)
class ExactMatchOutcome:
    """Scores per question type and of ``all``, and how many questions were asked now.

    Attributes:
        scores: per question type, and of ``all``.
        num_questions: number of questions.
        num_asked: number of questions that had no answer before.
        sample: the accuracies by image, in percent.
        baseline: the second model's answers.
        comparison: the model minus the baseline, in percentage points.
    """

    scores: dict[str, Score]
    num_questions: int
    num_asked: int
    sample: Sample
    baseline: Baseline | None = None
    comparison: Comparison | None = None

    @property
    def is_clustered(self) -> bool:
        """Whether an image has several questions."""
        return self.sample.num_images < len(self.sample.images)

    def interval(self, name: str) -> Interval:
        """Return the 95% interval of a type's accuracy (0 to 1), over images.

        Wilson's where each image has one question; otherwise the bootstrap of whole images.
        """
        if not self.is_clustered:
            return self.scores[name].interval
        low, high = self.sample.intervals[name]["accuracy"]
        return low / 100, high / 100

    @property
    def about(self) -> str:
        """What the intervals are over and how they are made, in words."""
        if not self.is_clustered:
            return f"over {self.sample.num_images:,} test images, not over training seeds: Wilson's"
        caution = self.sample.caution
        return describe(self.sample.num_images) + (f"; {caution}" if caution else "")


def run_exact_match(
    todo: ExactMatchRun, load: "Callable[[], TrainedStudent]", progress: Progress
) -> ExactMatchOutcome:
    """Check the images, ask the questions without an answer, and score all.

    Args:
        todo: the evaluation.
        load: loads the model; not called if every question has an answer.
        progress: called with a label, the done and all images or questions.

    Raises:
        MovekdError: entries cannot be asked, images cannot be used, the answers file belongs to
            another model, question file or number of tokens, or the baseline's file does not
            answer the same questions.
    """
    asked = load_questions(todo.questions)
    lines = [question.line for question in asked]
    read = read_from_folder(todo.images)
    given: dict[tuple[str, str], str] = {}
    origin, baseline = None, None
    if todo.answers is not None or todo.baseline is not None:
        origin = AnswerProvenance.of(todo.run, todo.questions, todo.max_new_tokens)
    if todo.baseline is not None and origin is not None:
        baseline = read_baseline(todo.baseline, lines, origin)

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

    if todo.answers is None or origin is None:
        ask({line.key for line in lines}, lambda at, text: given.update({lines[at].key: text}))
        num_asked, texts = len(lines), [given[line.key] for line in lines]
    else:
        with open_answers(todo.answers, lines, origin, take_parts=False) as stored:
            open_keys = {line.key for line in stored.open_questions(lines)}
            ask(open_keys, lambda at, text: stored.add(lines[at], text))
            num_asked, texts = len(open_keys), stored.texts(lines)
    conversations, right = [q.conversation for q in asked], [q.right for q in asked]
    sample = exact_match_sample(conversations, right, texts)
    comparison = None
    if baseline is not None:
        comparison = compare(sample, exact_match_sample(conversations, right, baseline.texts))
    scores = exact_match(conversations, right, texts)
    return ExactMatchOutcome(scores, len(lines), num_asked, sample, baseline, comparison)
