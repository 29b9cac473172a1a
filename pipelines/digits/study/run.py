"""Run the two training stages of an arm through ``movekd.train``, then answer questions.

Input: an arm, a world, a seed. Output: a row, the curves, and the routers' choices. The trained
student stays on disk, to answer the test scenes.

Legend: B images, N tokens with [CLS], L layers, E experts, C labels or places.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scenes
from movekd.cache import open_cache
from movekd.cache.layout import teacher_layout
from movekd.cache.verify import status
from movekd.config import read_yaml
from movekd.evaluate.image_folder import read_from_folder
from movekd.student import recorded_routing, routing
from movekd.student.checkpoint import TrainedStudent, load_student
from movekd.student.hf_loading import quiet_libraries
from movekd.student.vlm import image_features
from movekd.train.config import load_config
from movekd.train.run import train
from study import ideas  # noqa: F401 (registers loss terms that arms name)
from study.answers import answer, probe
from study.plan import REVISED, Arm, RunId
from study.results import Row
from study.worlds import UNSEEN_LOOKS, YAMLS, World, write_probe, write_test_scenes

STAGES = ("pretrain", "finetune")
CURVES = ("loss_text", "loss_kd", "token_std", "token_rank", "routing_max_share")
PLACES = 36  # patches of a scene
REPEATED = ("val", "token_std", "token_rank", "loss_kd")
"""Keys of the row that a repeated run must reproduce exactly."""


@dataclass(frozen=True)
class Task:
    """The input of a process.

    Attributes:
        run: identity of the run.
        arm: how it trains.
        world: scenes, teachers and caches.
        epochs: factor on the epochs of both stages; not 1 if the arm matches another's time.
        row: the earlier row of the same run; a student that is trained again must agree with it.
    """

    run: RunId
    arm: Arm
    world: World
    epochs: float = 1.0
    row: Row | None = None

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.world.work / "runs" / f"{self.run.arm}-{self.run.world}-{self.run.seed}"


def settings(arm: Arm, world: World) -> str:
    """Return a hash of everything that a row depends on except the seed and movekd's code."""
    digest = hashlib.sha256(repr((arm.cache, arm.keys, arm.pretrain)).encode())
    digest.update(repr((arm.matches_time_of, world.sizes)).encode())
    if arm.finetune or arm.counts_teachers or arm.is_main:  # rows of earlier plans have none
        digest.update(repr((arm.finetune, arm.counts_teachers, arm.is_main)).encode())
    digest.update(world.fingerprint.encode())
    for name in YAMLS:
        digest.update(json.dumps(read_yaml(world.folder / name), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def execute(task: Task) -> tuple[Row, Row]:
    """Train and evaluate; return the row and the curves.

    Raises:
        RuntimeError: the task has a row, and the student differs from it on validation scenes.
    """
    quiet_libraries()
    shutil.rmtree(task.folder, ignore_errors=True)
    logs: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    for stage in STAGES:
        with _timed(stage, seconds, cpu_seconds):
            logs[stage] = train_stage(task, stage)
    shutil.rmtree(task.folder / "pretrain")
    with _timed("evaluate", seconds, cpu_seconds):
        trained = load_student(task.folder / "finetune")
        accuracy = answer(trained, task.world.source, "val")
    row = {
        "arm": task.run.arm,
        "world": task.run.world,
        "seed": task.run.seed,
        "settings": settings(task.arm, task.world),
        "epochs": task.epochs,
        "val": accuracy,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "token_std": _ends(logs, "token_std"),
        "token_rank": _ends(logs, "token_rank"),
        "loss_kd": _ends(logs, "loss_kd"),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    name = {key: row[key] for key in ("arm", "world", "seed")}
    curves = {**name, **{stage: _curves(logs[stage]) for stage in STAGES}}
    if task.arm.cache is not None:
        row["cache"] = cache_figures(task.world.cache(task.arm.cache))
    if task.arm.has_experts:
        row["routing"], counts = routing_by_content(trained, task.world)
        if task.run.seed == 0:  # a figure shows one run
            curves["routing"] = counts
    _refuse_difference(task, row)
    return row, curves


def _refuse_difference(task: Task, again: Row) -> None:
    row = task.row or again
    for key in REPEATED:
        if again[key] != row[key]:
            shutil.rmtree(task.folder)
            raise RuntimeError(
                f"trained again, its {key} is {again[key]}, and was {row[key]}: another "
                "kind of processor or of library computes here. Take its line out of "
                "runs.jsonl and run the study again."
            )


def execute_and_test(task: Task) -> tuple[Row, Row, Row]:
    """Train, evaluate and answer the test questions; return ``execute``'s rows and ``final``'s."""
    row, curves = execute(task)
    return row, curves, final(task)


@contextmanager
def _timed(name: str, seconds: dict[str, float], cpu_seconds: dict[str, float]) -> Iterator[None]:
    """Note the wall time of the body and the CPU time of this process."""
    started, cpu_started = time.perf_counter(), time.process_time()
    yield
    seconds[name] = round(time.perf_counter() - started, 2)
    cpu_seconds[name] = round(time.process_time() - cpu_started, 2)


def train_stage(task: Task, stage: str) -> list[dict[str, float]]:
    """Train a stage; return its log."""
    arm, world = task.arm, task.world
    epochs = task.epochs * (world.sizes.finetune_epochs if stage == "finetune" else 1.0)
    overrides = [
        REVISED,
        f"data.shards={world.data}",
        f"data.conversations=[{world.source / stage}.json]",
        f"training.seed={task.run.seed}",
        f"training.num_train_epochs={epochs}",
        f"training.per_device_train_batch_size={world.sizes.batch_size}",
        "training.report_to=none",
        "training.use_cpu=true",
        f"training.logging_steps={world.sizes.logging_steps}",
        *arm.keys,
    ]
    if stage == "pretrain":
        overrides += arm.pretrain
    else:
        overrides += [*arm.finetune, f"init_from={task.folder / 'pretrain'}"]
    config = load_config(world.folder / f"{stage}.yaml", overrides)
    cache = None if arm.cache is None else world.cache(arm.cache)
    return train(config, task.folder / stage, cache).log


def cache_figures(folder: Path) -> dict[str, dict[str, float]]:
    """Return, per teacher, bytes per image, those of its tokens, and the sealed errors.

    The errors of a recoded cache are upper bounds: they include that of its source.
    """
    cache = open_cache(folder)
    figures = {}
    for found in status(cache):
        layout = cache[found.teacher].layout
        size = (layout.num_tokens, layout.width)
        tokens = teacher_layout(found.codec, *size, cls_width=None, num_heads=None)
        errors = {"error_mean": found.error_mean, "error_energy": found.error_energy}
        figures[found.teacher] = {
            "row_bytes": layout.row_bytes,
            "token_bytes": tokens.row_bytes,
            **{name: float(f"{error:.4g}") for name, error in errors.items() if error is not None},
        }
    return figures


def final(task: Task) -> Row:
    """Answer the test questions with the student of a run; return the row of the final file.

    A student that is not on disk is trained again.

    Raises:
        RuntimeError: the student trained again differs from its row on validation scenes.
    """
    quiet_libraries()
    if not (task.folder / "finetune/model").exists():
        execute(task)
    trained = load_student(task.folder / "finetune")
    row = {
        "arm": task.run.arm,
        "world": task.run.world,
        "seed": task.run.seed,
        "settings": settings(task.arm, task.world),
        "test": answer(trained, write_test_scenes(task.world), "test"),
    }
    if task.arm.is_main:
        for look in UNSEEN_LOOKS:
            row[look] = answer(trained, write_test_scenes(task.world, look), "test")
        row["probe"] = probe(task.folder / "finetune", write_probe(task.world))
    return row


@torch.no_grad()
def routing_by_content(
    trained: TrainedStudent, world: World
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return how the experts of a trained student depend on content, over validation scenes.

    Returns:
        The mutual information of expert and digit and of expert and place, in bits, mean over
        layers; and the counts: ``digit`` (L, E, 11; the last label is no digit) and ``place``
        (L, E, 36).
    """
    digit_LEC: Any = 0
    place_LEC: Any = 0
    transform = trained.student.image_transform(trained.geometry)
    images, first = read_from_folder(world.source / "images"), 0
    for batch, _ in scenes.draw_part("val", world.sizes.num_val, world.number, world.number):
        names = [f"val_{first + i:05d}.png" for i in range(len(batch))]
        first += len(batch)
        pixels = np.concatenate([transform.see(images(n), "base").pixels_VCHW for n in names])
        with recorded_routing(trained.student.vlm):
            image_features(trained.student.vlm, torch.from_numpy(pixels), None)
            records = routing(trained.student.vlm)
        choice_LBNE = torch.stack([record.choice_BNE[:, 1:] for record in records])
        label_BN = torch.from_numpy(scenes.grid_labels(batch)).flatten(1)
        place_BN = torch.arange(PLACES).expand_as(label_BN)
        digit_LEC = digit_LEC + _counts(choice_LBNE, label_BN, scenes.NUM_CLASSES)
        place_LEC = place_LEC + _counts(choice_LBNE, place_BN, PLACES)
    information = {
        "digit_bits": round(mutual_information(digit_LEC).mean().item(), 4),
        "place_bits": round(mutual_information(place_LEC).mean().item(), 4),
    }
    return information, {"digit": digit_LEC.int().tolist(), "place": place_LEC.int().tolist()}


def _counts(choice_LBNE: Tensor, label_BN: Tensor, num_labels: int) -> Tensor:
    one_hot_BNC = torch.nn.functional.one_hot(label_BN, num_labels).float()
    return torch.einsum("lbne,bnc->lec", choice_LBNE.float(), one_hot_BNC)


def mutual_information(counts_LEC: Tensor) -> Tensor:
    """Return the mutual information of expert and label in bits, (L,), from counts (L, E, C)."""
    joint_LEC = counts_LEC.double() / counts_LEC.double().sum((1, 2), keepdim=True)
    apart_LEC = joint_LEC.sum(2, keepdim=True) * joint_LEC.sum(1, keepdim=True)
    ratio_LEC = torch.where(joint_LEC > 0, joint_LEC / apart_LEC, 1.0)
    return (joint_LEC * ratio_LEC.log2()).sum((1, 2))


def _ends(logs: dict[str, list[dict[str, float]]], name: str) -> list[float] | None:
    """Return the first and last logged value over both stages, or None without one."""
    values = [entry[name] for stage in STAGES for entry in logs[stage] if name in entry]
    return [round(values[0], 5), round(values[-1], 5)] if values else None


def _curves(log: list[dict[str, float]]) -> dict[str, list[float]]:
    entries = [entry for entry in log if "loss" in entry]
    curves = {"step": [entry["step"] for entry in entries]}
    for name in CURVES:
        if entries and name in entries[0]:
            curves[name] = [float(f"{entry[name]:.5g}") for entry in entries]
    return curves
