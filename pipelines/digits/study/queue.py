"""Run all runs, a few at a time, and write a row for each; a second call resumes.

Every process computes with one thread, because the rows do not record the number of threads.
"""

import fcntl
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from demo import TEACHERS
from study import results, worlds
from study.plan import DERIVED, TIME_BASE, WORLDS, Arm, RunId, Sizes, find_arm, runs
from study.results import Row
from study.run import Task, execute, execute_and_test, final, settings
from study.worlds import World


@dataclass(frozen=True)
class Place:
    """Folders, sizes and number of processes of a study.

    Attributes:
        work: folder of worlds and trained students; not committed.
        results: folder of the rows; committed.
        sizes: sizes of worlds and runs.
        jobs: processes at a time.
    """

    work: Path
    results: Path
    sizes: Sizes
    jobs: int = 2

    def world(self, number: int) -> World:
        """Return a world by its number."""
        return World(number, self.work, self.sizes)


def prepare(place: Place, chosen: Sequence[Arm]) -> list[World]:
    """Make what the arms need of every world, unless it exists; return the worlds."""
    made = [place.world(number) for number in WORLDS]
    with _pool(place.jobs) as pool:
        teachers = [(w, name) for w in made if not w.shipped_weights for name in TEACHERS]
        _all(pool, worlds.train_teacher, [t for t in teachers if not _has_weights(*t)])
        for world in made:
            worlds.collect_weights(world)
        _all(pool, worlds.write_scenes, [(world,) for world in made])
        names = {arm.cache for arm in chosen if arm.cache}
        built = sorted({DERIVED.get(name, name) for name in names})
        derived = sorted(names & DERIVED.keys())
        for part in (built, derived):
            _all(pool, worlds.build, [(world, name) for name in part for world in made])
    return [place.world(number) for number in WORLDS]


def run_all(place: Place, chosen: Sequence[Arm]) -> None:
    """Train and evaluate every run that has no row yet.

    Raises:
        SystemExit: rows have other settings, or runs failed (raised after all others).
    """
    with _lock(place.work):
        made = prepare(place, chosen)
        _refuse_other_settings(place, chosen, made)
        for is_timed in (False, True):
            part = tuple(arm for arm in chosen if bool(arm.matches_time_of) is is_timed)
            have = results.by_run(results.read(place.results, "runs"))
            tasks = [
                Task(run, find_arm(run.arm), made[run.world], time_factor(have, run.arm))
                for run in runs(part)
                if run not in have
            ]

            def note(outcome: tuple[Row, Row]) -> Row:
                row, curves = outcome
                row["commit"] = _commit()
                results.append(place.results, "curves", curves)  # first: the row marks completion
                results.append(place.results, "runs", row)
                return row

            _go_through(place.jobs, execute, tasks, note, "val")


def run_and_test_all(place: Place, chosen: Sequence[Arm]) -> None:
    """Train, evaluate and test every run that lacks a row of ``runs`` or of ``final``.

    For a plan in which nothing is chosen between the runs and the test: a student that answers at
    once need not be kept, so the runs can be spread over several machines of one kind. The test
    rows are for the report, which shows them when all runs have one; nothing prints them before.

    Raises:
        SystemExit: rows have other settings, or runs failed (raised after all others).
    """
    with _lock(place.work):
        made = prepare(place, chosen)
        _refuse_other_settings(place, chosen, made)
        for world in made:
            worlds.write_test_scenes(world)
        have = results.by_run(results.read(place.results, "runs"))
        seen = results.by_run(results.read(place.results, "final"))
        left = [run for run in runs(tuple(chosen)) if run not in seen]
        left.sort(key=lambda run: run in have)  # those without any row first
        tasks = [Task(run, find_arm(run.arm), made[run.world], row=have.get(run)) for run in left]

        def note(outcome: tuple[Row, Row, Row]) -> Row:
            row, curves, tested = outcome
            if results.run_id(row) not in have:
                row["commit"] = _commit()
                results.append(place.results, "curves", curves)
                results.append(place.results, "runs", row)
            results.append(place.results, "final", tested)
            return row

        _go_through(place.jobs, execute_and_test, tasks, note, "val")


def run_final(place: Place, chosen: Sequence[Arm]) -> None:
    """Answer the test questions, once, with the student of every run of the arms.

    A student that is not on disk is trained again, and must equal the student of its row.

    Raises:
        SystemExit: runs are missing, or some failed (raised after all others).
    """
    with _lock(place.work):
        have = results.by_run(results.read(place.results, "runs"))
        missing = [run for run in runs(tuple(chosen)) if run not in have]
        if missing:
            raise SystemExit(
                f"study: {len(missing)} runs have no row yet ({missing[0]}, ...); the test scenes "
                "are looked at when all have. Run the study to its end first."
            )
        made = prepare(place, chosen)
        _refuse_other_settings(place, chosen, made)
        for world in made:
            worlds.write_test_scenes(world)
        seen = results.by_run(results.read(place.results, "final"))
        tasks = [
            Task(run, find_arm(run.arm), made[run.world], have[run]["epochs"], have[run])
            for run in runs(tuple(chosen))
            if run not in seen
        ]

        def note(row: Row) -> Row:
            results.append(place.results, "final", row)
            return row

        _go_through(place.jobs, final, tasks, note, "test")


def explore(place: Place, tasks: Sequence[Task], about: Row) -> None:
    """Run arms outside the plan on validation scenes; add ``about`` to their rows."""
    with _lock(place.work):
        prepare(place, [task.arm for task in tasks])

        def note(outcome: tuple[Row, Row]) -> Row:
            row = {**about, **outcome[0], "commit": _commit()}
            results.append(place.results, "exploratory", row)
            return row

        _go_through(place.jobs, execute, tasks, note, "val")


def time_factor(have: dict[RunId, Row], name: str) -> float:
    """Return the factor on an arm's epochs that makes it train as long as another arm.

    It is the factor in the arm's rows. Without a row it is the median ratio of the training times
    of the runs that both arms have.

    Raises:
        SystemExit: the arms have no such run yet.
    """
    longer = find_arm(name).matches_time_of
    if longer is None:
        return 1.0
    for run, row in have.items():
        if run.arm == name:
            return float(row["epochs"])
    ratios = [
        _train_seconds(row) / _train_seconds(have[base])
        for run, row in have.items()
        if run.arm == longer and (base := RunId(run.seed, run.world, TIME_BASE[longer])) in have
    ]
    if not ratios:
        raise SystemExit(
            f"study: '{name}' trains as long as '{longer}', which has no row yet; run "
            f"'{longer}' and '{TIME_BASE[longer]}' first."
        )
    return round(statistics.median(ratios), 3)


def _train_seconds(row: Row) -> float:
    # CPU time: wall time would include the other jobs.
    return float(row["cpu_seconds"]["pretrain"] + row["cpu_seconds"]["finetune"])


def _refuse_other_settings(place: Place, chosen: Sequence[Arm], made: Sequence[World]) -> None:
    """Refuse rows of another plan, other sizes or other worlds.

    Raises:
        SystemExit: names the row.
    """
    names = {arm.name: arm for arm in chosen}
    for row in results.read(place.results, "runs"):
        arm = names.get(row["arm"])
        if arm is not None and row["settings"] != settings(arm, made[row["world"]]):
            raise SystemExit(
                f"study: {place.results}/runs.jsonl holds a row of {results.run_id(row)} that was "
                "made with other settings than the plan, the YAML files or the world are of now; "
                "take such lines out (their runs are made again), or undo the change."
            )


def _go_through(
    jobs: int,
    work: Callable[[Task], Any],
    tasks: Sequence[Task],
    note: Callable[[Any], Row],
    part: str,
) -> None:
    """Do all tasks, note each outcome, print the progress.

    Raises:
        SystemExit: some failed; raised after all others.
    """
    started, failed = time.monotonic(), []
    with _pool(min(jobs, max(len(tasks), 1))) as pool:
        waiting: dict[Future[Any], Task] = {pool.submit(work, task): task for task in tasks}
        for number, done in enumerate(as_completed(waiting), start=1):
            task = waiting.pop(done)
            if (error := done.exception()) is not None:
                failed.append(task.run)
                print(f"{task.run}: {type(error).__name__}: {error}", flush=True)
                continue
            right, asked = note(done.result())[part]["all"]
            minutes = (time.monotonic() - started) / 60
            print(
                f"{number}/{len(tasks)} {task.run.arm} world {task.run.world} seed {task.run.seed}:"
                f" {right / asked:.3f}; {minutes:.1f} min, "
                f"{minutes / number * (len(tasks) - number):.0f} to go",
                flush=True,
            )
    if failed:
        raise SystemExit(f"study: {len(failed)} runs failed ({failed[0]}, ...); see above.")


def _has_weights(world: World, teacher: str) -> bool:
    name = f"{teacher}/model.safetensors"
    return any((world.folder / part / name).exists() for part in ("weights", f"training/{teacher}"))


def _all(pool: ProcessPoolExecutor, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    for done in as_completed([pool.submit(work, *each) for each in arguments]):
        done.result()


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of one-thread processes; after an interruption, do not wait for them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin_process)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _begin_process() -> None:
    """Use one thread, and end with the parent: the next study would make the same runs."""
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the parent handles it
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Refuse a second study in the same folder."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"study: another study is running in {work}; wait for it.") from None
        yield


def _commit() -> str:
    """Return the commit of the code, or ``unknown``."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
