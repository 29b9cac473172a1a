"""Questions in, answers and figures out, for a model that `movekd train` made.

``answer`` takes one question, ``generate_answers`` many, ``run_benchmark`` a benchmark's files.
The module ``exact_match`` compares answers with the right ones.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from movekd.evaluate.answers import Part
    from movekd.evaluate.benchmark_run import BenchmarkRun, Outcome, run_benchmark
    from movekd.evaluate.benchmarks import Benchmark, find_benchmark
    from movekd.evaluate.chat import Answer, answer
    from movekd.evaluate.generate import generate_answers, read_from_folder
    from movekd.evaluate.questions import Question
    from movekd.evaluate.report import Report

__all__ = [
    "Answer",
    "Benchmark",
    "BenchmarkRun",
    "Outcome",
    "Part",
    "Question",
    "Report",
    "answer",
    "find_benchmark",
    "generate_answers",
    "read_from_folder",
    "run_benchmark",
]

_MODULES = {
    "Answer": "movekd.evaluate.chat",
    "Benchmark": "movekd.evaluate.benchmarks",
    "BenchmarkRun": "movekd.evaluate.benchmark_run",
    "Outcome": "movekd.evaluate.benchmark_run",
    "Part": "movekd.evaluate.answers",
    "Question": "movekd.evaluate.questions",
    "Report": "movekd.evaluate.report",
    "answer": "movekd.evaluate.chat",
    "find_benchmark": "movekd.evaluate.benchmarks",
    "generate_answers": "movekd.evaluate.generate",
    "read_from_folder": "movekd.evaluate.generate",
    "run_benchmark": "movekd.evaluate.benchmark_run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
