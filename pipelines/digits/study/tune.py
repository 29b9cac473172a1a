"""Tune the official recipe, as the plan of twelve worlds says: one key after the other.

Each step tries a key's values with the best values of the steps before it, in the old worlds, on
validation scenes, with an exploratory seed. The best mean over the worlds stays; of equal ones the
first. An interruption loses one run: the next call reads the rows of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from study import explore, plan_twelve
from study.plan import FIRST_EXPLORATORY_SEED, WORLDS
from study.queue import Place
from study.results import Row


@dataclass(frozen=True)
class Step:
    """Values of one key.

    Attributes:
        key: the key.
        values: those that are tried; the first one is what the step before it used.
        is_of_stage_2: whether only stage 2 gets it.
    """

    key: str
    values: tuple[str, ...]
    is_of_stage_2: bool = False


STEPS = (
    Step("distill.kd_weight", ("0.5", "2", "8")),
    Step("training.learning_rate", ("1.0e-3", "2.0e-5", "2.0e-4", "5.0e-3"), is_of_stage_2=True),
    Step("distill.anchor_share", ("0.8", "0.25", "0.75")),
)
"""The first value of a later step is what the runs of the first step have: not run again."""
Setting = tuple[str, ...]
"""A value per step."""


def tune(place: Place) -> dict[Setting, float]:
    """Try the settings that the steps lead to; print them and what was chosen.

    Returns:
        Mean accuracy over the worlds of each setting, the chosen one last.
    """
    scores: dict[Setting, float] = {}
    chosen: Setting = tuple(step.values[0] for step in STEPS)
    for at, step in enumerate(STEPS):
        settings = [(*chosen[:at], value, *chosen[at + 1 :]) for value in step.values]
        for setting in settings:
            if setting not in scores:
                trial = trial_of(step, setting)
                rows = explore.run(place, trial, WORLDS, [FIRST_EXPLORATORY_SEED])
                scores[setting] = mean_accuracy(rows)
                print(f"{trial.name}: {scores[setting]:.4f}", flush=True)
        chosen = max(settings, key=lambda setting: scores[setting])
    both, finetune = keys_of(chosen)
    print(f"chosen: both stages {both}, stage 2 {finetune}")
    scores[chosen] = scores.pop(chosen)
    return scores


def keys_of(setting: Setting) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of both stages and those of stage 2."""
    keys = [(step.is_of_stage_2, f"{step.key}={v}") for step, v in zip(STEPS, setting, strict=True)]
    return tuple(k for late, k in keys if not late), tuple(k for late, k in keys if late)


def trial_of(step: Step, setting: Setting) -> explore.Trial:
    """Return a setting as an exploratory trial, counted as one of a step."""
    both, finetune = keys_of(setting)
    name = "official_" + "_".join(setting)
    return explore.Trial(name, f"official {step.key}", plan_twelve.OFFICIAL_ARM, both, (), finetune)


def mean_accuracy(rows: Sequence[Row]) -> float:
    """Return the mean over rows of the accuracy on validation scenes."""
    shares = [row["val"]["all"][0] / row["val"]["all"][1] for row in rows]
    return float(sum(shares) / len(shares))
