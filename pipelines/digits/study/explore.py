"""Runs outside of the plan: what hyperparameters are chosen by, and how a failure is looked into.

Validation scenes alone, seeds that the study does not use, a limited number of runs a question,
and none after the test scenes have been looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from study import queue, results
from study.plan import FIRST_EXPLORATORY_SEED, MAX_EXPLORATORY, RunId, find_arm
from study.run import Task


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        name: of it.
        question: that it shall answer; the limit is by question.
        base: arm that is changed.
        keys: changes in both stages, as ``a.b=c``.
        pretrain: changes in stage 1 alone.
    """

    name: str
    question: str
    base: str
    keys: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()


def run(
    place: queue.Place, trial: Trial, world_numbers: Sequence[int], seeds: Sequence[int]
) -> None:
    """Run a trial in some worlds with some seeds; an arm without changes is free.

    Raises:
        SystemExit: the test scenes have been looked at, the question has had its runs, or a seed
            is one of the study's.
    """
    base = find_arm(trial.base)
    arm = replace(
        base,
        name=trial.name,
        keys=(*base.keys, *trial.keys),
        pretrain=(*base.pretrain, *trial.pretrain),
        matches_time_of=None,
    )
    tasks = [
        Task(RunId(seed, number, arm.name), arm, place.world(number))
        for seed in seeds
        for number in world_numbers
    ]
    earlier = results.read(place.results, "exploratory")
    is_change = bool(trial.keys or trial.pretrain)
    made = sum(row["question"] == trial.question and row["is_change"] for row in earlier)
    if results.read(place.results, "final"):
        raise SystemExit(
            "study: the test scenes have been looked at; nothing is chosen after that."
        )
    if min(seeds) < FIRST_EXPLORATORY_SEED:
        raise SystemExit(f"study: exploratory seeds begin at {FIRST_EXPLORATORY_SEED}.")
    if is_change and made + len(tasks) > MAX_EXPLORATORY:
        raise SystemExit(
            f"study: {made} runs were made for '{trial.question}', and {len(tasks)} more are "
            f"asked for; the limit is {MAX_EXPLORATORY}."
        )
    about = {
        "question": trial.question,
        "base": base.name,
        "is_change": is_change,
        "keys": list(arm.keys),
        "pretrain": list(arm.pretrain),
    }
    queue.explore(place, tasks, about)
