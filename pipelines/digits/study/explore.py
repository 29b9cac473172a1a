"""Run trials outside the plan, to choose hyperparameters or to look into a failure.

Trials use validation scenes only, and seeds that the study does not use. The number of runs per
question is limited. No trial runs after the final pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from study import queue, results
from study.plan import FIRST_EXPLORATORY_SEED, MAX_EXPLORATORY, RunId, find_arm
from study.run import Task


@dataclass(frozen=True)
class Trial:
    """A change of an arm, tried to answer a question.

    Attributes:
        name: name of the trial.
        question: the question that it answers; the limit counts runs per question.
        base: arm that is changed.
        keys: changes in both stages, as ``a.b=c``.
        pretrain: changes in stage 1 only.
    """

    name: str
    question: str
    base: str
    keys: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()


def run(
    place: queue.Place, trial: Trial, world_numbers: Sequence[int], seeds: Sequence[int]
) -> None:
    """Run a trial in some worlds with some seeds. An unchanged arm does not count for the limit.

    Raises:
        SystemExit: the final pass has run, the question has used up its runs, or the study uses a
            seed.
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
