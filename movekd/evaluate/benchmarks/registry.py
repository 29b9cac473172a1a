"""The benchmarks of LLaVA's evaluation: how each is read, scored and uploaded.

A table, in which ``benchmark_run`` looks up what `movekd evaluate --benchmark` names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from movekd.errors import ConfigError, did_you_mean
from movekd.evaluate.benchmarks.multiple_choice import score_gqa, score_mmbench, score_science
from movekd.evaluate.benchmarks.pope_mme import score_mme, score_pope
from movekd.evaluate.benchmarks.questions import Question, load_jsonl, load_options, load_science
from movekd.evaluate.benchmarks.report import Report
from movekd.evaluate.benchmarks.submission import (
    upload_gqa,
    upload_mmbench,
    upload_vizwiz,
    upload_vqav2,
)
from movekd.evaluate.benchmarks.vqa import score_textvqa, score_vizwiz, score_vqav2

Score = Callable[[Sequence[Question], Sequence[str], Path], Report]
Upload = Callable[[Path, Sequence[Question], Sequence[str], Path | None], None]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: what ``--benchmark`` calls it.
        load: question file -> questions.
        score: questions, answers, annotations -> figures.
        annotations: what ``score`` wants, for people.
        upload: writes what the benchmark's server takes, where there is one.
    """

    name: str
    load: Callable[[Path], list[Question]]
    score: Score
    annotations: str
    upload: Upload | None = None


def _score_mmbench(questions: Sequence[Question], answers: Sequence[str], _: Path) -> Report:
    return score_mmbench(questions, answers)


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("pope", load_jsonl, score_pope, "the folder of coco_pope_*.json"),
        Benchmark("textvqa", load_jsonl, score_textvqa, "TextVQA_0.5.1_val.json"),
        Benchmark("gqa", load_jsonl, score_gqa, "testdev_balanced_questions.json", upload_gqa),
        Benchmark("sqa", load_science, score_science, "folder of problems.json, pid_splits.json"),
        Benchmark(
            *("vqav2", load_jsonl, score_vqav2),
            *("v2_mscoco_val2014_annotations.json", upload_vqav2),
        ),
        Benchmark("vizwiz", load_jsonl, score_vizwiz, "val.json", upload_vizwiz),
        Benchmark("mme", load_jsonl, score_mme, "MME_Benchmark_release_version (else --images)"),
        Benchmark(
            *("mmbench", load_options, _score_mmbench),
            *("nothing: the TSV has the answers", upload_mmbench),
        ),
    )
}


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            f"--benchmark is '{name}'; expected one of {', '.join(BENCHMARKS)}."
            f"{did_you_mean(name, BENCHMARKS)}"
        )
    return BENCHMARKS[name]
