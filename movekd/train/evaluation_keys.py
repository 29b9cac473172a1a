"""Check what a config says about held-out samples and their evaluation during the run.

Input: ``data.val_size``, ``data.eval_conversations``, ``data.probe_images`` and the `eval_...` keys
of `training:`. Output: `training:` with what transformers would otherwise guess. Used by ``config``
and ``training_args``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from movekd.errors import ConfigError, did_you_mean, shorten

if TYPE_CHECKING:
    from movekd.train.config import TrainConfig

SAVE_STEPS = 500
"""Default of `training.save_steps`."""
_ASKING = ("do_eval", "eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end")
"""Keys of `training:` that mean nothing without held-out samples."""


def evaluation_keys(config: "TrainConfig") -> dict[str, Any]:
    """Return `training:` of a config with the strategy that its `eval_...` keys mean.

    ``eval_steps`` means ``eval_strategy: steps``. The best step is that of the smallest loss.

    Raises:
        ConfigError: keys that contradict each other, or that would do nothing.
    """
    training, data = dict(config.training), config.data
    if training.get("eval_strategy") is False:  # YAML 1.1 reads `no` as false
        training["eval_strategy"] = "no"
    strategy, steps = training.get("eval_strategy"), training.get("eval_steps")
    has_held_out = data.val_size is not None or data.has_held_out_files
    if not has_held_out and data.probe_images is None:
        asking = [key for key in _ASKING if training.get(key) not in (None, False, "no")]
        if asking and not (asking == ["eval_steps"] and strategy == "no"):
            raise ConfigError(
                f"training.{asking[0]} asks for evaluation during the run, which has no data for "
                "it; hold some out with data.val_size (a share, or a number of conversations) or "
                "data.eval_conversations (files). Or leave it out, and run `movekd evaluate` on "
                "the result."
            )
        return training
    if data.val_size is not None and data.has_held_out_files:
        raise ConfigError(
            "data.val_size and data.eval_conversations are both given; expected one of them. The "
            "first takes held-out samples from data.conversations, the second reads other files."
        )
    if not has_held_out:
        _check_probe_only(training)
    if strategy is None and not steps and not has_held_out:
        raise ConfigError(
            "data.probe_images is given, but nothing says when to classify them; set "
            "training.eval_steps, for example 500, or training.eval_strategy: epoch."
        )
    if strategy is None and not steps:
        raise ConfigError(
            f"data.{'eval_conversations' if data.has_held_out_files else 'val_size'} holds samples "
            "out, but nothing says when to measure their loss; set training.eval_steps, for "
            "example 500, or training.eval_strategy: epoch. With training.eval_strategy: no they "
            "are held out and not measured."
        )
    if strategy == "steps" and not steps:
        raise ConfigError(
            "training.eval_strategy is steps, and training.eval_steps is missing; set it, for "
            "example to 500."
        )
    if strategy == "epoch" and steps:
        raise ConfigError(
            f"training.eval_strategy is epoch, and training.eval_steps is {steps}; leave one of "
            "them out."
        )
    training["eval_strategy"] = strategy or "steps"
    if training.get("greater_is_better"):
        raise ConfigError(
            "training.greater_is_better is true, but every held-out figure is a loss, and the "
            "smallest is the best; leave it out."
        )
    training["greater_is_better"] = False  # transformers takes `loss_text` for an accuracy
    _check_metric(config, training.get("metric_for_best_model"))
    if training.get("load_best_model_at_end"):
        _check_best({"save_strategy": "steps", "save_steps": SAVE_STEPS} | training)
    return training


def loss_names(config: "TrainConfig") -> list[str]:
    """Return the names of a run's held-out losses, which the log has with the prefix `eval_`."""
    names = ["loss", *(f"loss_{name}" for name in config.loss_terms)]
    if config.stage != "distill":
        names.append("loss_text")
    if config.distill is not None:
        kinds = ["loss_kd", *(["loss_summary"] if config.distill.summary_weight else [])]
        for kind in kinds:
            names += [kind, *(f"{kind}_{name}" for name in config.distill.teachers)]
    return names


def _check_probe_only(training: Mapping[str, Any]) -> None:
    """Refuse what asks for the loss of held-out samples, of which the run has none."""
    asking = [k for k in ("load_best_model_at_end", "metric_for_best_model") if training.get(k)]
    if training.get("save_strategy") == "best":
        asking.append("save_strategy")
    if training.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
        asking.append("lr_scheduler_type")
    if asking:
        raise ConfigError(
            f"training.{asking[0]} is {shorten(training[asking[0]], 80)}, which needs the loss of "
            "held-out samples, and data.probe_images gives accuracies only; hold samples out with "
            "data.val_size or data.eval_conversations, or leave it out."
        )


def _check_metric(config: "TrainConfig", metric: Any) -> None:
    known = loss_names(config)
    if metric is not None and str(metric).removeprefix("eval_") not in known:
        raise ConfigError(
            f"training.metric_for_best_model is {shorten(repr(metric))}; expected one of "
            f"{', '.join(known)}.{did_you_mean(str(metric), known)}"
        )


def _check_best(keys: Mapping[str, Any]) -> None:
    """Refuse ``load_best_model_at_end`` where the best step may have no checkpoint."""
    if keys.get("fsdp"):
        raise ConfigError(
            "training.load_best_model_at_end is not supported with training.fsdp; leave one of "
            "them out."
        )
    save, evaluate = keys["save_strategy"] or "no", keys["eval_strategy"]
    if evaluate == "no":
        raise ConfigError(
            "training.load_best_model_at_end needs evaluations, and training.eval_strategy is no; "
            "set training.eval_steps instead."
        )
    if save == "best":
        return
    if save != evaluate or (save == "steps" and keys.get("save_steps") != keys["eval_steps"]):
        found = f"save_strategy {save}, eval_strategy {evaluate}"
        if save == evaluate:
            found = f"save_steps {keys['save_steps']}, eval_steps {keys['eval_steps']}"
        raise ConfigError(
            "training.load_best_model_at_end needs a checkpoint of every step that is evaluated "
            f"(found {found}). Set save_steps to eval_steps, or save_strategy: best."
        )
