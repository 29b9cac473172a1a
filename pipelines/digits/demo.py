"""Run all of movekd on real handwriting; `movekd demo` runs this script.

    scenes -> pack -> plan -> cache four teachers -> train with and without them -> evaluate -> look

Every step is a `movekd` command, printed as you would type it. They run in two processes of one
thread each, because loading PyTorch eight times would take longer than the work, and two threads
of tiny models wait for each other: the arm with teachers trains beside the one without.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scenes
from demo_report import report
from movekd.config import read_yaml

HERE = Path(__file__).resolve().parent
TEACHERS = ("clip", "eva", "convnext", "sam")
ARMS = {"without teachers": ["distill=null"], "with teachers": []}
TOWER_RATE = "learning_rates.vision_tower=1.0e-3"
"""In stage 1. The recipe's 1e-4 is for a pretrained CLIP; this tower is small, its task another."""
NUM_SHOWN = 12
"""Test questions whose answers are printed: those about the first three scenes."""
SETTINGS = ("recipe", "distill", "trained", "learning_rates", "training")
"""Sections of a run's config.yaml that ``demo.json`` keeps, beside the student's experts."""


@dataclass(frozen=True)
class Step:
    """Time and memory of a step."""

    name: str
    seconds: float
    peak_gib: float
    """Peak memory of the process up to the end of this step."""


def main() -> None:
    """Parse the command line and run every step."""
    for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "PASSIVE")):
        os.environ.setdefault(name, value)  # torch reads it when it is imported, below
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="Folder to write.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of scenes and training.")
    parser.add_argument("--retrain", action="store_true", help="Train the small teachers first.")
    parser.add_argument("--scenes", type=int, default=1, help="Multiply the number of scenes.")
    parser.add_argument("--json", action="store_true", help="Print figures as JSON.")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        figures = run(arguments.output, arguments.seed, arguments.retrain, arguments.scenes)
    if arguments.json:
        print(json.dumps(figures, indent=1))


def run(output: Path, seed: int = 0, retrain: bool = False, size: int = 1) -> dict[str, Any]:
    """Run the demo; return (and write to ``output/demo.json``) its figures."""
    started = time.perf_counter()
    steps: list[Step] = []
    pipeline = retrained_pipeline(output, seed) if retrain else HERE
    source, data, cache = output / "source", output / "data", output / "cache"
    with timed("scenes", steps):
        print(f"\n$ python {HERE.name}/scenes.py --output {source} --seed {seed}", flush=True)
        scenes.write_corpus(
            source,
            num_pretrain=2560 * size,
            num_finetune=1280 * size,
            num_val=64,
            num_test=512,
            seed=seed,
        )
    with timed("pack", steps):
        stages = [
            part
            for s in ("pretrain", "finetune")
            for part in ("--llava-json", source / f"{s}.json")
        ]
        movekd(
            "shards",
            "pack",
            *stages,
            "--images",
            source / "images",
            "--output",
            data,
            "--overwrite",
        )
    teachers = [
        part for t in TEACHERS for part in ("--teacher", pipeline / "teachers" / f"{t}.yaml")
    ]
    with timed("plan", steps):
        movekd("cache", "plan", *teachers, "--shards", data, "--cache", cache, "--student-grid", 6)
    with timed("cache", steps):
        movekd("cache", "build", *teachers, "--shards", data, "--cache", cache, "--batch-size", 64)
    figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "seed": seed, "arms": {}}
    for result in run_arms(pipeline, output, seed):
        figures["arms"][result["arm"]] = result["figures"]
        steps += [Step(**step) for step in result["steps"]]
    figures["questions"] = [
        [
            asked["conversations"][0]["value"].removeprefix("<image>\n"),
            asked["conversations"][1]["value"],
        ]
        for asked in json.loads((source / "test.json").read_text(encoding="utf-8"))[:NUM_SHOWN]
    ]
    with timed("look", steps):
        trained = output / "runs/with_teachers/finetune"
        sheets = ("--random", 2, "--output", output / "sheets")
        movekd("cache", "show", "--cache", cache, "--shards", data, *sheets)
        asked = ("--questions", source / "test.json", "--images", source / "images")
        movekd("report", trained, *asked)
    figures["steps"] = [vars(step) for step in steps]
    figures["seconds"] = time.perf_counter() - started
    (output / "demo.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    report(figures, output, pipeline)
    return figures


def run_arms(pipeline: Path, output: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Train and evaluate both arms at the same time; yield what ``run_arm`` returns of each.

    What the second process prints follows when it has ended.
    """
    here, beside = ARMS
    path = output / "beside.json"
    path.unlink(missing_ok=True)
    other = multiprocessing.get_context("spawn").Process(
        target=run_beside, args=(path, beside, pipeline, output, seed), daemon=True
    )
    other.start()
    yield run_arm(here, pipeline, output, seed)
    other.join()
    if not path.exists():
        raise SystemExit(other.exitcode or 1)  # it has said why
    result = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    print(result.pop("printed"), end="", flush=True)
    yield result


def run_beside(path: Path, *arguments: Any) -> None:
    """Run an arm in this process; write what it returns and prints to ``path``, as JSON."""
    from movekd.cli.failures import run_guarded

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = run_arm(*arguments)
        result["printed"] = printed.getvalue()
        path.write_text(json.dumps(result), encoding="utf-8")

    run_guarded(run)


def run_arm(arm: str, pipeline: Path, output: Path, seed: int) -> dict[str, Any]:
    """Train both stages of an arm and evaluate it; return its name, figures and steps."""
    steps: list[Step] = []
    data, source, cache = output / "data", output / "source", output / "cache"
    folder, changes = output / "runs" / arm.replace(" ", "_"), ARMS[arm]
    with timed(f"train {arm}", steps):
        before = [TOWER_RATE, *changes]
        first = train(pipeline, folder, "pretrain", data, source, cache, seed, before)
        after = ["init_from=" + str(folder / "pretrain"), *changes]
        second = train(pipeline, folder, "finetune", data, source, cache, seed, after)
    with timed(f"evaluate {arm}", steps):
        accuracy, answers = evaluate(folder / "finetune", source)
    figures = {"accuracy": accuracy, "answers": answers, "pretrain": first, "finetune": second}
    figures["settings"] = {stage: settings(folder / stage) for stage in ("pretrain", "finetune")}
    return {"arm": arm, "figures": figures, "steps": [vars(step) for step in steps]}


def movekd(*arguments: Any, run_quietly: bool = False) -> str:
    """Run a `movekd` command in this process; return what it printed.

    Raises:
        MovekdError: the command could not do its work.
        SystemExit: the command finished with problems.
    """
    from movekd.cli.main import app

    words = [str(argument) for argument in arguments]
    print("\n$ movekd " + " ".join(words), flush=True)
    captured = io.StringIO()
    target: Any = captured if run_quietly else sys.stdout
    with contextlib.redirect_stdout(target):
        code = app(words, standalone_mode=False)
    if code:
        raise SystemExit(code)
    return captured.getvalue()


def train(
    pipeline: Path,
    folder: Path,
    stage: str,
    data: Path,
    source: Path,
    cache: Path,
    seed: int,
    changes: list[str],
) -> list[dict[str, float]]:
    """Train a stage; return its log."""
    overrides = [
        f"data.shards={data}",
        f"data.conversations=[{source / stage}.json]",
        f"training.seed={seed}",
    ]
    words: list[Any] = ["train", "--config", pipeline / f"{stage}.yaml", "--output", folder / stage]
    for override in [*overrides, *changes]:
        words += ["--set", override]
    if "distill=null" not in changes:
        words += ["--cache", cache]
    movekd(*words, "--overwrite")
    log = json.loads((folder / stage / "log.json").read_text(encoding="utf-8"))
    return [entry for entry in log if "loss" in entry]


def evaluate(run_dir: Path, source: Path) -> tuple[dict[str, Any], list[str]]:
    """Evaluate on unseen scans; return accuracy and interval per question type, and answers."""
    answers = run_dir.parent / "answers.jsonl"
    answers.unlink(missing_ok=True)  # of an earlier demo; `evaluate` would refuse its model
    printed = movekd(
        "evaluate", run_dir, "--questions", source / "test.json", "--images", source / "images",
        "--batch-size", 128, "--max-new-tokens", 4, "--answers", answers, "--json",
        run_quietly=True,
    )  # fmt: skip
    lines = answers.read_text(encoding="utf-8").splitlines()[:NUM_SHOWN]
    return dict(json.loads(printed)), [json.loads(line)["text"] for line in lines]


def settings(run_dir: Path) -> dict[str, Any]:
    """Return what the recipe and the YAML file set in a run, without its paths."""
    config = read_yaml(run_dir / "config.yaml")
    return {"mole": config["student"]["mole"]} | {name: config[name] for name in SETTINGS}


def retrained_pipeline(output: Path, seed: int) -> Path:
    """Train the small models again; return a folder of YAML files that use them."""
    import pretrain  # loads torch and scikit-learn

    folder = output / "pipeline"
    for name in ("teachers", "pretrain.yaml", "finetune.yaml"):
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            copy(HERE / name, folder / name)
    pretrain.pretrain(folder / "weights", seed=seed)
    return folder


@contextmanager
def timed(name: str, steps: list[Step]) -> Iterator[None]:
    """Append time and memory of the body to ``steps``."""
    started = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    steps.append(Step(name, time.perf_counter() - started, peak))


if __name__ == "__main__":
    from movekd.cli.failures import run_guarded

    run_guarded(main)
