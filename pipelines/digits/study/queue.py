"""Run all runs, a few at a time, and write a row for each; a second call resumes.

Every process computes with one thread, because the rows do not record the number of threads.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demo import TEACHERS
from study import results, worlds
from study.plan import DERIVED, SHIPPED_CACHE, TIME_BASE, Arm, RunId, Sizes, runs
from study.processes import each, lock, pool_of
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


def prepare(place: Place, chosen: Sequence[Arm]) -> dict[int, World]:
    """Make what the arms need of their worlds, unless it exists; return the worlds by number."""
    numbers = sorted({number for arm in chosen for number in arm.worlds})
    made = [place.world(number) for number in numbers]
    with pool_of(place.jobs) as pool:
        teachers = [(w, name) for w in made if not w.shipped_weights for name in TEACHERS]
        each(pool, worlds.train_teacher, [t for t in teachers if not _has_weights(*t)])
        for world in made:
            worlds.collect_weights(world)
        each(pool, worlds.write_scenes, [(world,) for world in made])
        needed = {(n, arm.cache) for arm in chosen if arm.cache for n in arm.worlds}
        built = sorted({(n, DERIVED.get(name, name)) for n, name in needed})
        derived = sorted((n, name) for n, name in needed if name in DERIVED)
        for part in (built, derived):
            each(pool, worlds.build, [(place.world(number), name) for number, name in part])
    return {number: place.world(number) for number in numbers}


def run_all(place: Place, chosen: Sequence[Arm]) -> None:
    """Train and evaluate every run that has no row yet.

    Raises:
        SystemExit: rows have other settings, or runs failed (raised after all others).
    """
    with lock(place.work):
        made = prepare(place, chosen)
        _refuse_other_settings(place, chosen, made)
        for part in _untimed_first(chosen):
            have = results.by_run(results.read(place.results, "runs"))
            left = [run for run in runs(part) if run not in have]

            def note(outcome: tuple[Row, Row]) -> Row:
                _append(place, *outcome)
                return outcome[0]

            _go_through(place.jobs, execute, _tasks(left, chosen, made, have), note, "val")


def run_and_test_all(place: Place, chosen: Sequence[Arm]) -> None:
    """Train, evaluate and test every run that lacks a row of ``runs`` or of ``final``.

    For a plan in which nothing is chosen between the runs and the test: a student that answers at
    once need not be kept, so the runs can be spread over several machines of one kind. The test
    rows are for the report, which shows them when all runs have one; nothing prints them before.

    Raises:
        SystemExit: rows have other settings, or runs failed (raised after all others).
    """
    with lock(place.work):
        made = prepare(place, chosen)
        _refuse_other_settings(place, chosen, made)
        for number, world in made.items():
            worlds.write_test_scenes(world)
            if any(arm.is_main and number in arm.worlds for arm in chosen):
                worlds.write_more_tests(world)
        for part in _untimed_first(chosen):
            have = results.by_run(results.read(place.results, "runs"))
            seen = results.by_run(results.read(place.results, "final"))
            left = [run for run in runs(part) if run not in seen]
            left.sort(key=lambda run: run in have)  # those without any row first

            def note(outcome: tuple[Row, Row, Row], have: dict[RunId, Row] = have) -> Row:
                row, curves, tested = outcome
                if results.run_id(row) not in have:
                    _append(place, row, curves)
                results.append(place.results, "final", tested)
                return row

            tasks = _tasks(left, chosen, made, have)
            _go_through(place.jobs, execute_and_test, tasks, note, "val")


def _untimed_first(chosen: Sequence[Arm]) -> list[tuple[Arm, ...]]:
    """Return the arms in two parts: the second one matches times of the first one's rows."""
    return [
        tuple(arm for arm in chosen if (arm.matches_time_of is not None) is is_timed)
        for is_timed in (False, True)
    ]


def _tasks(
    left: Sequence[RunId],
    chosen: Sequence[Arm],
    made: Mapping[int, World],
    have: Mapping[RunId, Row],
) -> list[Task]:
    """Return a task per run. A run that has a row must repeat it, for as many epochs."""
    named = {arm.name: arm for arm in chosen}
    return [
        Task(
            run,
            named[run.arm],
            made[run.world],
            time_factor(have, named[run.arm], made),
            have.get(run),
        )
        for run in left
    ]


def _append(place: Place, row: Row, curves: Row) -> None:
    row["commit"] = _commit()
    results.append(place.results, "curves", curves)  # first: the row marks completion
    results.append(place.results, "runs", row)


def run_final(place: Place, chosen: Sequence[Arm]) -> None:
    """Answer the test questions, once, with the student of every run of the arms.

    A student that is not on disk is trained again, and must equal the student of its row.

    Raises:
        SystemExit: runs are missing, or some failed (raised after all others).
    """
    with lock(place.work):
        have = results.by_run(results.read(place.results, "runs"))
        missing = [run for run in runs(chosen) if run not in have]
        if missing:
            raise SystemExit(
                f"study: {len(missing)} runs have no row yet ({missing[0]}, ...); the test scenes "
                "are looked at when all have. Run the study to its end first."
            )
        made = prepare(place, chosen)
        _refuse_other_settings(place, chosen, made)
        for world in made.values():
            worlds.write_test_scenes(world)
        seen = results.by_run(results.read(place.results, "final"))
        tasks = _tasks([run for run in runs(chosen) if run not in seen], chosen, made, have)

        def note(row: Row) -> Row:
            results.append(place.results, "final", row)
            return row

        _go_through(place.jobs, final, tasks, note, "test")


def explore(place: Place, tasks: Sequence[Task], about: Row) -> None:
    """Run arms outside the plan on validation scenes; add ``about`` to their rows."""
    with lock(place.work):
        prepare(place, [replace(task.arm, worlds=(task.run.world,)) for task in tasks])

        def note(outcome: tuple[Row, Row]) -> Row:
            row = {**about, **outcome[0], "commit": _commit()}
            results.append(place.results, "exploratory", row)
            return row

        _go_through(place.jobs, execute, tasks, note, "val")


def time_factor(have: Mapping[RunId, Row], arm: Arm, made: Mapping[int, World]) -> float:
    """Return the factor on an arm's epochs that makes it train as long as another arm.

    It is the factor in the arm's rows. Without a row it is the median ratio of the training times
    of the runs that both arms have, in the worlds of the arm.

    Raises:
        SystemExit: the arms have no such run yet.
    """
    longer = arm.matches_time_of
    if longer is None:
        return 1.0
    for run, row in have.items():
        if run.arm == arm.name:
            return float(row["epochs"])

    def teachers(run: RunId) -> float:
        return made[run.world].teacher_seconds(SHIPPED_CACHE) if arm.counts_teachers else 0.0

    ratios = [
        (_train_seconds(row) + teachers(run)) / _train_seconds(have[base])
        for run, row in have.items()
        if run.arm == longer
        and run.world in arm.worlds
        and (base := RunId(run.seed, run.world, TIME_BASE[longer])) in have
    ]
    if not ratios:
        raise SystemExit(
            f"study: '{arm.name}' trains as long as '{longer}', which has no row yet; run "
            f"'{longer}' and '{TIME_BASE[longer]}' first."
        )
    return round(statistics.median(ratios), 3)


def _train_seconds(row: Row) -> float:
    # CPU time: wall time would include the other jobs.
    return float(row["cpu_seconds"]["pretrain"] + row["cpu_seconds"]["finetune"])


def _refuse_other_settings(place: Place, chosen: Sequence[Arm], made: Mapping[int, World]) -> None:
    """Refuse rows of another plan, other sizes or other worlds.

    Raises:
        SystemExit: names the row.
    """
    names = {arm.name: arm for arm in chosen}
    for row in results.read(place.results, "runs"):
        arm = names.get(row["arm"])
        if arm is None or row["world"] not in made:
            continue
        if row["settings"] != settings(arm, made[row["world"]]):
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
    with pool_of(min(jobs, max(len(tasks), 1))) as pool:
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


def _commit() -> str:
    """Return the commit of the code, or ``unknown``."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
