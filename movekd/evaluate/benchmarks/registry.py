"""The table of benchmarks that `movekd evaluate --benchmark` knows.

A new benchmark is one new file with its loader and scorer, and one line in the table below (from
outside of movekd: one call of ``register_benchmark``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from movekd.errors import ConfigError, did_you_mean
from movekd.evaluate.benchmarks.multiple_choice import score_gqa, score_mmbench, score_science
from movekd.evaluate.benchmarks.pope_mme import score_mme, score_pope
from movekd.evaluate.benchmarks.questions import Question, load_jsonl, load_options, load_science
from movekd.evaluate.benchmarks.report import Report
from movekd.evaluate.benchmarks.submission import (
    write_gqa,
    write_mmbench,
    write_vizwiz,
    write_vqav2,
)
from movekd.evaluate.benchmarks.vqa import score_textvqa, score_vizwiz, score_vqav2

Score = Callable[[Sequence[Question], Sequence[str], Path], Report]
WriteSubmission = Callable[[Path, Sequence[Question], Sequence[str], Path | None], None]


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read, scored and submitted.

    Attributes:
        name: value of ``--benchmark``.
        load: question file -> questions.
        score: questions, answers, right answers -> figures.
        annotations: files that ``score`` needs, for messages.
        submit: writes the file for the benchmark's server; None if it has no server.
        answers_in: where the right answers are if ``--annotations`` is not given: nowhere, in the
            image folder, or in the question file (then ``--annotations`` is not used).
        has_split: ``submit`` takes the question file of the whole split.
    """

    name: str
    load: Callable[[Path], list[Question]]
    score: Score
    annotations: str
    submit: WriteSubmission | None = None
    answers_in: Literal["images", "questions"] | None = None
    has_split: bool = False


BENCHMARKS: dict[str, Benchmark] = {}


def register_benchmark(benchmark: Benchmark) -> None:
    """Make a benchmark known to `movekd evaluate --benchmark` and ``find_benchmark``.

    Raises:
        ConfigError: another one has that name.
    """
    if benchmark.name in BENCHMARKS:
        raise ConfigError(f"the benchmark '{benchmark.name}' exists already; give another name.")
    BENCHMARKS[benchmark.name] = benchmark


for _benchmark in (
    Benchmark("pope", load_jsonl, score_pope, "the folder of coco_pope_*.json"),
    Benchmark("textvqa", load_jsonl, score_textvqa, "TextVQA_0.5.1_val.json"),
    Benchmark("gqa", load_jsonl, score_gqa, "testdev_balanced_questions.json", write_gqa),
    Benchmark("sqa", load_science, score_science, "folder of problems.json, pid_splits.json"),
    Benchmark(
        *("vqav2", load_jsonl, score_vqav2, "v2_mscoco_val2014_annotations.json", write_vqav2),
        has_split=True,
    ),
    Benchmark("vizwiz", load_jsonl, score_vizwiz, "val.json", write_vizwiz),
    Benchmark(
        *("mme", load_jsonl, score_mme, "MME_Benchmark_release_version (else --images)"),
        answers_in="images",
    ),
    Benchmark(
        *("mmbench", load_options, score_mmbench, "nothing: the TSV has the answers"),
        *(write_mmbench, "questions"),
    ),
):
    register_benchmark(_benchmark)


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name.

    Raises:
        ConfigError: the name is unknown; names the nearest.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            f"--benchmark is '{name}'; expected one of {', '.join(BENCHMARKS)}."
            f"{did_you_mean(name, BENCHMARKS)}"
        )
    return BENCHMARKS[name]
