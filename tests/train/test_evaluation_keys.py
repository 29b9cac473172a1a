"""Tests of movekd.train.evaluation_keys: what a config may say about held-out samples."""

import pytest

from movekd.errors import ConfigError
from movekd.train.evaluation_keys import evaluation_keys
from movekd.train.training_args import training_arguments

HELD = "data.val_size=0.2"
BEST = (HELD, "training.load_best_model_at_end=true")


@pytest.mark.parametrize(
    ("stage", "keys", "said"),
    [
        ("pretrain", ("training.eval_steps=5",), r"training\.eval_steps asks for .*data\.val_size"),
        ("pretrain", ("training.eval_on_start=true",), r"training\.eval_on_start asks for eval"),
        ("pretrain", ("training.do_eval=true",), r"training\.do_eval asks for evaluation"),
        ("pretrain", ("training.load_best_model_at_end=true",), r"load_best.* asks for evaluation"),
        ("pretrain", (HELD,), r"data\.val_size holds samples out, but nothing says.*eval_steps"),
        (
            "pretrain",
            (HELD, "training.eval_steps=5", "data.eval_conversations=[a.json]"),
            r"val_size and data\.eval_conversations are both given; expected one",
        ),
        (
            "pretrain",
            (HELD, "training.eval_strategy=steps"),
            r"and training\.eval_steps is missing",
        ),
        (
            "pretrain",
            (HELD, "training.eval_strategy=epoch", "training.eval_steps=5"),
            r"eval_strategy is epoch, and training\.eval_steps is 5",
        ),
        ("pretrain", (HELD, "training.eval_strategy=often"), r"eval_strategy: .*'often'"),
        ("pretrain", (HELD, "training.eval_steps=0"), r"eval_steps: .*greater than 0"),
        (
            "pretrain",
            (HELD, "training.eval_steps=5", "training.metric_for_best_model=eval_loss_kd_clap"),
            r"metric_for_best_model is 'eval_loss_kd_clap'; expected one of loss, loss_text, "
            r"loss_kd, loss_kd_clip, loss_kd_sam\. Did you mean 'loss_kd_clip'",
        ),
        (
            "distill",
            (HELD, "training.eval_steps=5", "training.metric_for_best_model=loss_text"),
            r"'loss_text'; expected one of loss, loss_kd, loss_kd_clip",
        ),
        (
            "pretrain",
            (HELD, "training.eval_steps=5", "training.greater_is_better=true"),
            r"greater_is_better is true, but every held-out figure is a loss",
        ),
        (
            "pretrain",
            (*BEST, "training.eval_steps=5", "training.save_steps=10"),
            r"needs a checkpoint of every step that is evaluated \(found .*Set save_steps to eval",
        ),
        (
            "pretrain",
            (*BEST, "training.eval_strategy=epoch"),
            r"needs a checkpoint of every step that is evaluated",
        ),
        (
            "pretrain",
            (*BEST, "training.eval_strategy=no"),
            r"load_best_model_at_end needs evaluations, and training\.eval_strategy is no",
        ),
        (
            "pretrain",
            (*BEST, "training.eval_steps=5", "training.save_steps=5", "training.fsdp=full_shard"),
            r"load_best_model_at_end is not supported with training\.fsdp",
        ),
    ],
)
def test_what_contradicts_itself_is_a_sentence_before_anything_starts(digits, stage, keys, said):
    with pytest.raises(ConfigError, match=said):
        digits.config(stage, *keys)


def test_the_default_of_save_steps_is_heeded(digits, tmp_path):
    keys = (*BEST, "training.save_strategy=steps")
    with pytest.raises(ConfigError, match=r"save_steps 500, eval_steps 5\)"):
        digits.config("pretrain", *keys, "training.eval_steps=5")
    config = digits.config("pretrain", *keys, "training.eval_steps=500")
    assert training_arguments(config, tmp_path).load_best_model_at_end


def test_eval_steps_means_steps_and_the_smallest_loss_is_the_best(digits, tmp_path):
    config = digits.config(
        "pretrain", HELD, "training.eval_steps=5", "training.metric_for_best_model=loss_text"
    )
    found = training_arguments(config, tmp_path)
    assert found.eval_strategy == "steps"
    assert found.eval_steps == 5
    assert found.greater_is_better is False  # transformers: true, for the name ends otherwise
    off = digits.config("pretrain", HELD, "training.eval_strategy=no", "training.eval_steps=5")
    assert training_arguments(off, tmp_path).eval_strategy == "no"


def test_a_config_without_the_keys_is_as_before(digits):
    config = digits.config("pretrain")
    assert evaluation_keys(config) == config.training
    assert config.data.val_size is None
    assert config.data.eval_conversations == []
    assert "eval_strategy" not in config.training
    off = digits.config("pretrain", "training.eval_strategy=no", "training.eval_steps=5")
    assert evaluation_keys(off)["eval_strategy"] == "no"
