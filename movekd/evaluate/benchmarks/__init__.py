"""Benchmarks of LLaVA's evaluation: load questions, score answers, write submission files."""

from movekd.evaluate.benchmarks.answers import Part
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.registry import Benchmark, find_benchmark, register_benchmark
from movekd.evaluate.benchmarks.report import Report
from movekd.evaluate.benchmarks.run import BenchmarkRun, Outcome, run_benchmark

__all__ = [
    "Benchmark",
    "BenchmarkRun",
    "Outcome",
    "Part",
    "Question",
    "Report",
    "find_benchmark",
    "register_benchmark",
    "run_benchmark",
]
