"""Run one benchmark on one model: ask the questions, store the answers, score them.

Input: the folder of a run and the benchmark's own files. Output: an answers file, which a second
call resumes, a ``Report`` and a submission file. Used by `movekd evaluate --benchmark`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.answers import (
    ANSWERS_DIR,
    AnswerProvenance,
    AnswersFile,
    Part,
    open_answers,
)
from movekd.evaluate.benchmarks.baseline import Baseline, read_baseline
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.registry import BENCHMARKS, Benchmark, find_benchmark
from movekd.evaluate.benchmarks.report import Report
from movekd.evaluate.sample import Comparison, compare

if TYPE_CHECKING:  # scoring stored answers loads no torch
    from movekd.student.checkpoint import TrainedStudent

MAX_NEW_TOKENS = 128
"""Default, as in LLaVA's scripts."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchmarkRun:
    """One evaluation.

    Attributes:
        run: output of `movekd train` or `import`, or an export of format hf.
        benchmark: name of the benchmark.
        questions: its question file.
        images: folder of its images, if the question file does not hold them.
        annotations: its right answers.
        answers: answers file; None: ``answers/<question file>.jsonl`` in ``run``.
        baseline: answers file of a second model, to compare with.
        submission: file to write for the benchmark's server.
        submission_split: question file of the whole split, for VQAv2's server.
        part: part of the questions; None for all.
        batch_size: questions per batch.
        max_new_tokens: maximum new tokens per answer.
    """

    run: Path
    benchmark: str
    questions: Path
    images: Path | None = None
    annotations: Path | None = None
    answers: Path | None = None
    submission: Path | None = None
    submission_split: Path | None = None
    part: Part | None = None
    batch_size: int = 32
    max_new_tokens: int = MAX_NEW_TOKENS
    baseline: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of one evaluation.

    Attributes:
        answers: the answers file.
        num_questions: number of questions, of the part if one was given.
        num_asked: number of questions that had no answer before.
        report: the figures; None without annotations or for a part.
        missing: what to do to get figures; None if ``report`` has them.
        baseline: the second model's answers.
        comparison: the model minus the baseline.
    """

    answers: Path
    num_questions: int
    num_asked: int
    report: Report | None
    missing: str | None = None
    baseline: Baseline | None = None
    comparison: Comparison | None = None


def run_benchmark(
    todo: BenchmarkRun, load: "Callable[[], TrainedStudent]", progress: Progress
) -> Outcome:
    """Ask the open questions, store the answers, score them and write the submission file.

    Args:
        todo: the evaluation.
        load: loads the model; not called if every question has an answer.
        progress: called with a label, the answered questions and all questions.

    Raises:
        MovekdError: files do not fit each other; names them.
    """
    benchmark = find_benchmark(todo.benchmark)
    _check(todo, benchmark)
    every = benchmark.load(todo.questions)
    truth = _right_answers(todo, benchmark, every)
    if truth is not None and not truth.exists():
        raise ConfigError(f"{truth} does not exist; expected {benchmark.annotations}.")
    path = todo.answers or todo.run / ANSWERS_DIR / f"{todo.questions.stem}.jsonl"
    asked = every
    if todo.part is not None:
        asked, path = todo.part.of(every), todo.part.beside(path)
    origin = AnswerProvenance.of(todo.run, todo.questions, todo.max_new_tokens)
    baseline = None
    if todo.baseline is not None:  # before the questions are asked, which may take hours
        _require_score(benchmark, truth)
        baseline = read_baseline(todo.baseline, every, origin)
    with open_answers(path, every, origin, take_parts=todo.part is None) as answers:
        num_asked = _answer(todo, load, asked, answers, progress)
        texts = answers.texts(asked)
    if todo.part is not None:
        missing = "run without --partition when every part is answered"
        return Outcome(path, len(asked), num_asked, None, missing)
    if todo.submission is not None and benchmark.submit is not None:
        benchmark.submit(todo.submission, asked, texts, todo.submission_split)
    if truth is None:
        missing = f"give --annotations: {benchmark.annotations}"
        if benchmark.answers_in == "questions":
            missing = "the question file has no answers: --submission is for the server"
        return Outcome(path, len(asked), num_asked, None, missing)
    report = benchmark.score(asked, texts, truth)
    comparison = None
    if baseline is not None:
        other = benchmark.score(asked, baseline.texts, truth).sample
        if report.sample is None or other is None:
            raise ConfigError(
                f"the scorer of {benchmark.name} returns a Report without a sample, so no "
                "comparison can be made; expected one. Leave --baseline out, or set Report.sample."
            )
        comparison = compare(report.sample, other)
    return Outcome(path, len(asked), num_asked, report, None, baseline, comparison)


def _require_score(benchmark: Benchmark, truth: Path | None) -> None:
    """Refuse a comparison where no score is made."""
    if truth is None:
        raise ConfigError(
            f"--baseline compares scores, and {benchmark.name} is not scored here without right "
            f"answers; expected --annotations: {benchmark.annotations}. Give it, or leave "
            "--baseline out."
        )


def _check(todo: BenchmarkRun, benchmark: Benchmark) -> None:
    """Refuse options that do not fit the benchmark."""
    if todo.submission is not None and benchmark.submit is None:
        able = [known.name for known in BENCHMARKS.values() if known.submit is not None]
        raise ConfigError(
            f"{benchmark.name} has no server; --submission is for {', '.join(able)}. Give "
            f"--annotations: {benchmark.annotations}."
        )
    if todo.submission is not None and todo.part is not None:
        raise ConfigError(
            "--submission needs every answer and --partition gives some; run without --partition "
            "when each part is answered."
        )
    if todo.baseline is not None and todo.part is not None:
        raise ConfigError(
            "--baseline compares all answers and --partition gives some; run without --partition "
            "when each part is answered."
        )
    if todo.submission_split is not None and not (todo.submission and benchmark.has_split):
        able = [known.name for known in BENCHMARKS.values() if known.has_split]
        raise ConfigError(
            f"--submission-split goes with --benchmark {' or '.join(able)} and --submission; leave "
            "it out."
        )


def _right_answers(
    todo: BenchmarkRun, benchmark: Benchmark, questions: Sequence[Question]
) -> Path | None:
    """Return the file or folder of the right answers, or None if it is not given."""
    if benchmark.answers_in == "questions":
        return todo.questions if all(q.answer is not None for q in questions) else None
    if benchmark.answers_in == "images" and todo.annotations is None:
        return todo.images
    return todo.annotations


def _answer(
    todo: BenchmarkRun,
    load: "Callable[[], TrainedStudent]",
    questions: Sequence[Question],
    answers: AnswersFile,
    progress: Progress,
) -> int:
    """Ask the open questions; return how many they were."""
    asked = answers.open_questions(questions)
    if not asked:
        return 0
    from movekd.evaluate.image_folder import check_images, read_from_folder

    read = None if todo.images is None else read_from_folder(todo.images)
    with_image = [q for q in asked if q.image is not None or q.embedded is not None]
    for question in with_image:
        if read is None and question.embedded is None:
            question.read_image(None)  # says which folder lacks
    readers = {
        str(q.image) if q.embedded is None else f"question {q.id}": partial(q.read_image, read)
        for q in with_image
    }
    check_images(readers, progress)
    from movekd.evaluate.generate import generate_answers

    trained = load()
    given = generate_answers(
        trained.student,
        [question.to_conversation(str(place)) for place, question in enumerate(asked)],
        lambda place: asked[int(place)].read_image(read),
        prompt=trained.prompt,
        geometry=trained.geometry,
        batch_size=todo.batch_size,
        max_new_tokens=todo.max_new_tokens,
    )
    for done, (question, answer) in enumerate(zip(asked, given, strict=True), start=1):
        answers.add(question, answer)
        progress("evaluate", len(questions) - len(asked) + done, len(questions))
    return len(asked)
