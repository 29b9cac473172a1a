"""What is compared of runs: which figures, what they were measured on, and what they mean.

Input: ``ComparedRun`` objects. Output: ``Measure`` objects, each run's value of one, and what must
be equal before two values are compared (``meaning``, ``measured_on``) or paired (``trained_on``).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from movekd.train.step_losses import MAX_OVER_MEDIAN
from movekd.view.arms import FEATURES_OF, ComparedRun, lookup

Group = Literal["held-out samples and probe", "training", "each teacher"]
GROUPS: tuple[Group, ...] = get_args(Group)
_NO_FIGURE = ("runtime", "samples_per_second", "steps_per_second")
_HELD_OUT, _PROBE = "eval_", "eval_knn_"
_LAST_SHARE = 0.1
"""Share of the steps, the last ones, over which a training figure is averaged."""
_TEXT = ("stage", "student.prompt", "student.language_model", "data.model_max_length")
"""Keys that decide which tokens a text loss is a mean over."""
_FIRST = ("eval_loss_text", "loss_text", "eval_loss", "loss")
"""Figures that head their group; the others follow by name."""
_WEIGHTS = ("kd_weight", "summary_weight")
_OF_ALL = ("teachers", "teacher_weighting", "anchor", "anchor_share")
"""Keys of ``distill`` that do not change the loss of one teacher."""
_BALANCE = ("student.mole.balance", "student.mole.balance_weight", "student.mole.num_experts")


@dataclass(frozen=True)
class Measure:
    """A figure of runs.

    Attributes:
        name: its name in the log.
        at: final (the last value; of training the mean over the last tenth of the steps), or best
            (over all evaluations of the run).
        group: where the page shows it.
        goal: what is better; None: neither.
    """

    name: str
    at: Literal["final", "best"]
    group: Group
    goal: Literal["lower", "higher"] | None

    def value(self, run: ComparedRun) -> float | None:
        """Return a run's figure, NaN where it is not finite; None if the run has none."""
        if self.name in run.log.ending:
            return run.log.ending[self.name]
        steps, values = run.log.series(self.name)
        if not values:
            return None
        if self.at == "best":
            finite = [value for value in values if not math.isnan(value)]
            pick = min if self.goal == "lower" else max
            return pick(finite) if finite else math.nan
        if self.name.startswith(_HELD_OUT):
            return values[-1]
        since = (1 - _LAST_SHARE) * run.num_steps
        last = [v for step, v in zip(steps, values, strict=True) if step > since] or values[-1:]
        return sum(last) / len(last)


COSTS = ("seconds_per_step", "samples_per_second", "memory_peak_gib")
"""Figures of time and memory, which are listed and not compared."""


def cost(name: str, run: ComparedRun) -> float | None:
    """Return one of ``COSTS``; None if the run did not log it.

    Seconds are those of training steps, without evaluation. They are unknown for packed rows, whose
    speed is logged in samples.
    """
    if name == "memory_peak_gib":
        return max((e[name] for e in run.log.steps if name in e), default=None)
    seconds, steps, before = 0.0, 0.0, 0.0
    for entry in run.log.steps:
        rate = entry.get("samples_per_second", 0.0)
        if rate > 0:  # not NaN either
            steps += entry["step"] - before
            seconds += (entry["step"] - before) / rate
        before = entry["step"]
    per_step = run.samples_per_step
    if min(seconds, steps) <= 0:
        return None
    if name == "samples_per_second":
        return steps / seconds
    return None if per_step is None or _is_packed(run) else seconds / steps * per_step


def find_measures(runs: Sequence[ComparedRun]) -> list[Measure]:
    """Return every measure that a run has, group by group."""
    logs = [run.log for run in runs]
    evaluated = {name for log in logs for name in log.names(_HELD_OUT)}
    names = {name for name in evaluated if not name.endswith(_NO_FIGURE)}
    names |= {name for log in logs for name in (*log.names("loss"), *log.names("token_"))}
    names |= {n for log in logs for n in log.ending if n.startswith(MAX_OVER_MEDIAN)}
    found = []
    for name in sorted(names, key=lambda n: (_FIRST.index(n) if n in _FIRST else len(_FIRST), n)):
        goal = _goal(name)
        group: Group = "training" if name not in evaluated else "held-out samples and probe"
        if _teacher_of(name):
            group = "each teacher"
        found.append(Measure(name, "final", group, goal))
        if name in evaluated and goal is not None:
            found.append(Measure(name, "best", group, goal))
    return sorted(found, key=lambda measure: GROUPS.index(measure.group))


def meaning(measure: Measure, run: ComparedRun) -> dict[str, Any]:
    """Return the keys that decide what a figure means, with the run's values.

    Losses of two arms whose values differ are different things, such as the sum of all terms with
    two weights of the KD loss.
    """
    name = measure.name.removeprefix(_HELD_OUT)
    if name == "loss":
        balance = {} if measure.name.startswith(_HELD_OUT) else _at(run, _BALANCE)
        terms = _section(run, "distill") | _section(run, "loss_terms")
        return _at(run, _TEXT) | terms | balance
    if name == "loss_text":
        return _at(run, _TEXT)
    if name == "loss_balance":
        return _at(run, _BALANCE[::2])
    if teacher := _teacher_of(name):
        kept = _section(run, "distill", without=(*_WEIGHTS, *_OF_ALL))
        own = f"distill.{FEATURES_OF}{teacher}"
        return {k: v for k, v in kept.items() if FEATURES_OF not in k or k == own}
    if name in ("loss_kd", "loss_summary"):
        return _section(run, "distill", without=_WEIGHTS)
    if name.startswith("loss_"):
        term = f"loss_terms.{name.removeprefix('loss_')}"
        return _at(run, ["stage"]) | _section(run, term, without=["weight"])
    return {}


def measured_on(measure: Measure, run: ComparedRun) -> dict[str, Any]:
    """Return the checksums of what a figure was measured on; equal only to its own, if unknown."""
    if run.inputs is None:
        return {"the data (a run of an older version recorded no checksums)": run.folder}
    if measure.name.startswith(_PROBE):
        return {"data.probe_images": run.inputs.get("probe images")}
    if not measure.name.startswith(_HELD_OUT):
        return _trained_data(run)
    if "held-out conversations" in run.inputs:
        found = {"data.eval_conversations": run.inputs["held-out conversations"]}
    else:
        found = _trained_data(run)
    if measure.at == "best":
        found["steps of the evaluations"] = run.log.series(measure.name)[0]
    return found


def trained_on(run: ComparedRun) -> dict[str, Any]:
    """Return what runs must share besides their seed to be a pair."""
    samples = {"the number of samples seen": run.num_samples}
    if run.inputs is None:
        return samples | {"the data (not recorded)": run.folder}
    return samples | _trained_data(run) | {"the order of samples": run.inputs.get("order")}


def data_set(run: ComparedRun) -> str:
    """Return text that is equal for runs on the same data."""
    return run.folder if run.inputs is None else str(_trained_data(run))


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the names under which two records differ; of a missing section only its name."""
    found = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return [key for key in found if key.rpartition(".")[0] not in found]


def _trained_data(run: ComparedRun) -> dict[str, Any]:
    inputs = run.inputs or {}
    return {
        "data.shards": inputs.get("corpus"),
        "data.conversations": inputs.get("conversations"),
        "data.sources.weight": inputs.get("weights"),
        "data.val_size": (lookup(run.keys, "data.val_size"), inputs.get("split")),
    }


def _is_packed(run: ComparedRun) -> bool:
    return bool(lookup(run.keys, "data.packing"))


def _goal(name: str) -> Literal["lower", "higher"] | None:
    if name.endswith("accuracy"):
        return "higher"
    return "lower" if name.removeprefix(_HELD_OUT).startswith("loss") else None


def _teacher_of(name: str) -> str | None:
    """Return the teacher that a figure is of."""
    for start in ("loss_kd_", "loss_summary_", MAX_OVER_MEDIAN):
        if (of := name.removeprefix(_HELD_OUT)).startswith(start):
            return of.removeprefix(start)
    return None


def _section(run: ComparedRun, section: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """Return a section of the config and its keys, by their dotted names."""
    found = lookup(run.keys, section)
    if not isinstance(found, Mapping):
        return {section: found}
    inner = {f"{section}.{key}": value for key, value in found.items() if key not in without}
    return {section: "given", **inner}


def _at(run: ComparedRun, keys: Iterable[str]) -> dict[str, Any]:
    return {key: lookup(run.keys, key) for key in keys}
