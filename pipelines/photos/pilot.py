"""Distil on photographs and probe before and after: a pilot with one seed per arm.

    divide the images -> pack -> cache the teachers -> train each arm -> probe

    PYTHONPATH=pipelines/digits python pipelines/photos/pilot.py --images cifar10
    PYTHONPATH=pipelines/digits python pipelines/photos/pilot.py --images cifar10 --final

The first form trains every arm and probes validation images: settings are chosen from them.
``--final`` reads the test images, with the arms that are marked for it. Every step is a `movekd`
command in its own process. A row in benchmarks/results/pilot is done and stays:

    runs.jsonl   per arm: keys, figures of the training, probe on validation images
    final.jsonl  per arm: probe on test images, minus the untrained tower and minus other arms

The same command resumes. Only the control ``full_shuffled`` needs code outside of the commands.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from demo_real import HERE, Steps, write_spec
from movekd.config import read_yaml
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError
from pilot_arms import ARMS, TEACHERS, Arm
from pilot_images import Sizes, divide
from pilot_rows import Row, scores, tables, training_figures
from study import results
from study.controls import shuffle_cache
from weights import make_weights

RESULTS = HERE.parents[1] / "benchmarks" / "results" / "pilot"
YAML = HERE / "distill.yaml"


@dataclass
class Pilot:
    """Folders, sizes and steps of a pilot.

    Attributes:
        steps: what is done; it also runs the commands.
        output: folder of images, cache and runs; not committed.
        images: ``train/CLASS`` and ``test/CLASS``.
        weights: folder of converted weights.
        rows: folder of the rows; committed.
        sizes: images per class.
        seed: of all trainings.
        probed: further models that the final pass probes.
        extra: further words of each training.
    """

    steps: Steps
    output: Path
    images: Path
    weights: Path
    rows: Path = RESULTS
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    probed: Sequence[str] = ()
    extra: Sequence[str] = ()

    def train(self, arms: Sequence[Arm]) -> None:
        """Train the arms that have no row yet, probe validation images, and add their rows.

        Raises:
            ConfigError: a row was made with other settings.
        """
        todo = [arm for arm in arms if not self._has(arm)]
        if not todo:
            return
        self._prepare(todo)
        for arm in todo:
            run = self.output / "runs" / arm.name
            started = time.perf_counter()
            self._train_arm(arm, run)
            row = {"arm": arm.name, **self._settings(arm), **training_figures(run, arm.teachers)}
            row |= {"seconds": round(time.perf_counter() - started, 1)}
            if self.sizes.val:
                row["val"] = self._probe(f"probe {arm.name}", "val", [f"base:{run}", run])
            row["corpus"] = open_corpus(self.output / "data").fingerprint()
            row |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
            results.append(self.rows, "runs", row)

    def final(self, arms: Sequence[Arm]) -> None:
        """Probe the test images with the untrained tower and all arms, and add the rows.

        Raises:
            ConfigError: an arm has no row yet, or one with other settings.
        """
        missing = [arm.name for arm in arms if not self._has(arm)]
        if missing:
            raise ConfigError(
                f"{self.rows}/runs.jsonl lacks {', '.join(missing)}; expected all arms, because "
                "the test images are read once. Train them first: the same command without --final."
            )
        names = [arm.name for arm in arms]
        done = {row["arm"] for row in results.read(self.rows, "final")}
        if done.issuperset(names):
            return
        runs = [self.output / "runs" / name for name in names]
        listed = ", ".join(names)
        minus_base = self._probe(
            f"test of base, {listed}", "test", [f"base:{runs[0]}", *runs, *self.probed]
        )
        minus = {first: self._minus(first, arms) for first in names}
        for name in [name for name in minus_base if name not in done]:
            row: Row = {"arm": name, "test": minus_base[name], "sizes": asdict(self.sizes)}
            for first, found in minus.items():
                if name in found:
                    row[f"minus_{first}"] = {k: score["minus"] for k, score in found[name].items()}
            results.append(self.rows, "final", row | {"date": time.strftime("%Y-%m-%d")})

    def _minus(self, first: str, arms: Sequence[Arm]) -> dict[str, Row]:
        """Return the scores on test images of the arms that are compared with another one."""
        names = [arm.name for arm in arms if first in arm.compared_with and arm.name != first]
        if not names:
            return {}
        runs = [self.output / "runs" / name for name in (first, *names)]
        found = self._probe(f"test of {', '.join((first, *names))}", "test", runs)
        return {name: found[name] for name in names}

    def _has(self, arm: Arm) -> bool:
        for row in results.read(self.rows, "runs"):
            if row["arm"] == arm.name:
                wanted = self._settings(arm)
                found = {key: row.get(key) for key in wanted}
                if found != wanted:
                    raise ConfigError(
                        f"the row '{arm.name}' of {self.rows}/runs.jsonl was made with {found}"
                        f"; asked for {wanted}. Give the arm another name, or remove the line."
                    )
                return True
        return False

    def _settings(self, arm: Arm) -> Row:
        return {
            "teachers": list(arm.teachers),
            "keys": list(arm.keys),
            "yaml": hashlib.sha256(json.dumps(read_yaml(YAML)).encode()).hexdigest()[:16],
            "steps": arm.steps,
            "cache": arm.cache,
            "seed": self.seed,
            "sizes": asdict(self.sizes),
        }

    def _prepare(self, arms: Sequence[Arm]) -> None:
        """Divide and pack the images, and cache the teachers of the arms."""
        steps, output = self.steps, self.output
        steps.do("images", lambda: divide(self.images, output, self.sizes))
        data, cache = output / "data", output / "cache"
        steps.movekd(
            *("pack", "shards", "pack", "--images", output / "source", "--output", data),
            "--overwrite",
        )
        for teacher in dict.fromkeys(name for arm in arms for name in arm.teachers):
            spec = write_spec(teacher, output, self.weights)
            words = ("--teacher", spec, "--shards", data, "--cache", cache)
            steps.movekd(f"cache {teacher}", "cache", "build", *words)
        if any(arm.cache == "shuffled" for arm in arms):
            shuffle_cache(cache, output / "shuffled", self.seed)
        for codec in {arm.cache for arm in arms} - {"cache", "shuffled"}:
            recode = ("--cache", cache, "--to", codec, "--output", output / codec)
            steps.movekd(f"recode {codec}", "cache", "recode", *recode)

    def _train_arm(self, arm: Arm, run: Path) -> None:
        keys = [
            "recipe=revised_2026_11",
            f"data.shards={self.output / 'data'}",
            f"student.vision_tower={self.weights / 'vit_s'}",
            f"distill.teachers=[{', '.join(arm.teachers)}]",
            f"training.max_steps={arm.steps}",
            f"training.seed={self.seed}",
            *arm.keys,
        ]
        words: list[Any] = ["train", "--config", YAML, "--output", run]
        words += [word for key in keys for word in ("--set", key)]
        words += ["--cache", self.output / arm.cache, *self.extra]
        words += ["--resume"] if run.exists() else []
        name = " ".join(["train", arm.name, arm.cache, str(arm.steps), *arm.teachers, *arm.keys])
        self.steps.movekd(name, *words)

    def _probe(self, name: str, part: str, models: Sequence[Any]) -> dict[str, Row]:
        """Return the scores per model: probe and feature -> accuracy, interval, difference."""
        images, kept = self.output / part, self.output / "features"
        words = ("--images", images, "--features", kept, "--device", "cpu", "--json")
        self.steps.movekd(name, "probe", *models, *words)
        return scores(self.steps.printed(name))


def main() -> None:
    """Parse the command line and run what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="Folder: train/ and test/.")
    parser.add_argument("--output", type=Path, default=Path("pilot"), help="Folder to write.")
    parser.add_argument("--weights", type=Path, default=Path("demo-real/weights"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the rows.")
    parser.add_argument("--only", nargs="+", help="Names of arms. Default: all.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all trainings.")
    parser.add_argument("--final", action="store_true", help="Read the test images.")
    given = parser.parse_args()
    unknown = set(given.only or ()) - {arm.name for arm in ARMS}
    if unknown:
        raise ConfigError(
            f"--only names {', '.join(sorted(unknown))}; expected of "
            f"{', '.join(arm.name for arm in ARMS)}."
        )
    chosen = tuple(arm for arm in ARMS if given.only is None or arm.name in given.only)
    output, weights = given.output.resolve(), given.weights.resolve()
    make_weights(weights, TEACHERS)
    sizes = Sizes()
    steps = Steps(output, asdict(sizes) | {"seed": given.seed})
    pilot = Pilot(
        steps,
        output,
        given.images.resolve(),
        weights,
        given.results.resolve(),
        sizes=sizes,
        seed=given.seed,
    )
    if given.final:
        spec = write_spec("efficientnet_lite0", output, weights)
        marked = [arm for arm in chosen if arm.is_final]
        replace(pilot, probed=[f"teacher:{spec}"]).final(marked)
        print("\n".join(tables(pilot.rows)))
    else:
        pilot.train(chosen)


if __name__ == "__main__":
    from movekd.cli.failures import run_guarded

    run_guarded(main)
