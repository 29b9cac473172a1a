"""Run trials outside the plan, to choose hyperparameters or to look into a failure.

Trials use validation scenes only, and seeds that the study does not use. The number of runs per
question is limited. No trial runs after the final pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from study import queue, results
from study.plan import FIRST_EXPLORATORY_SEED, MAX_EXPLORATORY, Arm, RunId
from study.results import Row
from study.run import Task

KEYS = ("keys", "pretrain", "finetune")
"""Columns of a row that say what was tried."""


@dataclass(frozen=True)
class Trial:
    """A change of an arm, tried to answer a question.

    Attributes:
        name: name of the trial.
        question: the question that it answers; the limit counts runs per question.
        base: arm that is changed.
        keys: changes in both stages, as ``a.b=c``.
        pretrain: changes in stage 1 only.
        finetune: changes in stage 2 only.
    """

    name: str
    question: str
    base: Arm
    keys: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()


def run(
    place: queue.Place, trial: Trial, world_numbers: Sequence[int], seeds: Sequence[int]
) -> list[Row]:
    """Run a trial in some worlds with some seeds; return its rows.

    A run that has a row already is not made again. An unchanged arm does not count for the limit.

    Raises:
        SystemExit: the final pass has run, the question has used up its runs, the study uses a
            seed, or an earlier trial of this name had other keys.
    """
    base = trial.base
    arm = replace(
        base,
        name=trial.name,
        keys=(*base.keys, *trial.keys),
        pretrain=(*base.pretrain, *trial.pretrain),
        finetune=(*base.finetune, *trial.finetune),
        matches_time_of=None,
    )
    about = {
        "question": trial.question,
        "base": base.name,
        "is_change": bool(trial.keys or trial.pretrain or trial.finetune),
        "keys": list(arm.keys),
        "pretrain": list(arm.pretrain),
        "finetune": list(arm.finetune),
    }
    earlier = results.read(place.results, "exploratory")
    have = results.by_run(row for row in earlier if row["arm"] == arm.name)
    for row in have.values():
        if any(row.get(name, []) != about[name] for name in ("question", *KEYS)):
            raise SystemExit(
                f"study: a trial '{arm.name}' was made with other keys or for another question "
                f"({row['question']}); give this one another name."
            )
    tasks = [
        Task(run_id, arm, place.world(run_id.world))
        for run_id in (RunId(seed, number, arm.name) for seed in seeds for number in world_numbers)
        if run_id not in have
    ]
    made = sum(row["question"] == trial.question and row["is_change"] for row in earlier)
    if tasks and results.read(place.results, "final"):
        raise SystemExit(
            "study: the test scenes have been looked at; nothing is chosen after that."
        )
    if min(seeds) < FIRST_EXPLORATORY_SEED:
        raise SystemExit(f"study: exploratory seeds begin at {FIRST_EXPLORATORY_SEED}.")
    if about["is_change"] and made + len(tasks) > MAX_EXPLORATORY:
        raise SystemExit(
            f"study: {made} runs were made for '{trial.question}', and {len(tasks)} more are "
            f"asked for; the limit is {MAX_EXPLORATORY}."
        )
    if tasks:
        queue.explore(place, tasks, about)
    return [row for row in results.read(place.results, "exploratory") if row["arm"] == arm.name]
