"""One benchmark of one model: questions asked, answers kept, figures and upload file made.

Comes in: a run's directory and the benchmark's own files. Goes out: an answers file that a second
call goes on from, a ``Report``, a file to upload. Used by `movekd evaluate --benchmark`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from movekd.evaluate.benchmarks.questions import Question, image_reader
from movekd.evaluate.benchmarks.registry import BENCHMARKS, Benchmark, find_benchmark
from movekd.evaluate.benchmarks.report import Report

if TYPE_CHECKING:  # torch is loaded where something is asked, and not where all is answered
    from movekd.student.checkpoint import TrainedStudent

MAX_NEW_TOKENS = 128
"""As in LLaVA's scripts."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchmarkRun:
    """What is to be evaluated.

    Attributes:
        run: output of `movekd train` or `import`, or an export of format hf.
        benchmark: name of the benchmark.
        questions: its question file.
        images: folder of its images, where the question file does not hold them.
        annotations: its right answers.
        answers: answers file; None: ``answers/<question file>.jsonl`` in ``run``.
        upload: file for the benchmark's server.
        upload_split: VQAv2's question file of the whole split.
        part: which part of the questions, None for all.
        batch_size: questions at a time.
        max_new_tokens: longest answer.
    """

    run: Path
    benchmark: str
    questions: Path
    images: Path | None = None
    annotations: Path | None = None
    answers: Path | None = None
    upload: Path | None = None
    upload_split: Path | None = None
    part: Part | None = None
    batch_size: int = 32
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        answers: where the answers are.
        num_questions: questions of this run or part of it.
        num_asked: how many had no answer yet.
        report: the figures, or None without annotations or for a part.
        missing: what to do for figures, where there are none.
    """

    answers: Path
    num_questions: int
    num_asked: int
    report: Report | None
    missing: str | None = None


def run_benchmark(
    todo: BenchmarkRun, load: "Callable[[], TrainedStudent]", progress: Progress
) -> Outcome:
    """Ask what has no answer yet, keep the answers, score them and write the upload file.

    Args:
        todo: what to do.
        load: loads the model; not called where every question is answered.
        progress: called with what is being done, questions answered, questions in all.

    Raises:
        MovekdError: files do not fit each other; says which.
    """
    benchmark = find_benchmark(todo.benchmark)
    _check(todo, benchmark)
    every = benchmark.load(todo.questions)
    truth = _annotations(todo, every)
    if truth is not None and not truth.exists():
        raise ConfigError(f"{truth} does not exist; expected {benchmark.annotations}.")
    path = todo.answers or todo.run / ANSWERS_DIR / f"{todo.questions.stem}.jsonl"
    asked = every
    if todo.part is not None:
        asked, path = todo.part.of(every), todo.part.beside(path)
    origin = AnswerProvenance.of(todo.run, todo.questions, todo.max_new_tokens)
    with open_answers(path, every, origin, take_parts=todo.part is None) as answers:
        num_asked = _answer(todo, load, asked, answers, progress)
        texts = answers.texts(asked)
    if todo.part is not None:
        missing = "run without --part when every part is answered"
        return Outcome(path, len(asked), num_asked, None, missing)
    if todo.upload is not None and benchmark.upload is not None:
        benchmark.upload(todo.upload, asked, texts, todo.upload_split)
    if truth is None:
        missing = f"give --annotations: {benchmark.annotations}"
        if todo.benchmark == "mmbench":
            missing = "the question file has no answers: --upload is for the server that has them"
        return Outcome(path, len(asked), num_asked, None, missing)
    return Outcome(path, len(asked), num_asked, benchmark.score(asked, texts, truth))


def _check(todo: BenchmarkRun, benchmark: Benchmark) -> None:
    """Refuse options that mean nothing for the benchmark."""
    if todo.upload is not None and benchmark.upload is None:
        able = [known.name for known in BENCHMARKS.values() if known.upload is not None]
        raise ConfigError(
            f"{benchmark.name} has no server to upload to; --upload is for {', '.join(able)}. Give "
            f"--annotations: {benchmark.annotations}."
        )
    if todo.upload is not None and todo.part is not None:
        raise ConfigError(
            "--upload needs every answer and --part gives some; run without --part when each part "
            "is answered."
        )
    if todo.upload_split is not None and (benchmark.name != "vqav2" or todo.upload is None):
        raise ConfigError("--upload-split goes with --benchmark vqav2 and --upload; leave it out.")


def _annotations(todo: BenchmarkRun, questions: Sequence[Question]) -> Path | None:
    """Return what the benchmark is scored by, or None where there is nothing."""
    if todo.benchmark == "mmbench":
        return todo.questions if all(q.answer is not None for q in questions) else None
    if todo.benchmark == "mme" and todo.annotations is None:
        return todo.images
    return todo.annotations


def _answer(
    todo: BenchmarkRun,
    load: "Callable[[], TrainedStudent]",
    questions: Sequence[Question],
    answers: AnswersFile,
    progress: Progress,
) -> int:
    """Ask what has no answer yet; return how many that were."""
    asked = answers.open_questions(questions)
    if not asked:
        return 0
    from movekd.evaluate.generate import generate_answers, read_from_folder

    trained = load()
    given = generate_answers(
        trained.student,
        [question.to_conversation(str(place)) for place, question in enumerate(asked)],
        image_reader(asked, None if todo.images is None else read_from_folder(todo.images)),
        prompt=trained.prompt,
        geometry=trained.geometry,
        batch_size=todo.batch_size,
        max_new_tokens=todo.max_new_tokens,
    )
    for done, (question, answer) in enumerate(zip(asked, given, strict=True), start=1):
        answers.add(question, answer)
        progress("evaluate", len(questions) - len(asked) + done, len(questions))
    return len(asked)
