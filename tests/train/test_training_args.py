"""Tests of movekd.train.training_args: what `training:` may say, and from which transformers on."""

from types import SimpleNamespace

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from movekd.errors import ConfigError
from movekd.train.config import TrainConfig
from movekd.train.training_args import divide_step, global_batch_size


def test_an_unknown_argument_of_the_trainer_is_named(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.learning_rat .*Did you mean 'learning_rate'"):
        digits.train(tmp_path, "pretrain", "training.learning_rat=1")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("training.learning_rate=fast", r"training: learning_rate: .*number.*\(found 'fast'\)"),
        ("training.eval_delay=often", r"training\.eval_delay is 'often'; expected a number"),
        ("training.eval_strategy=steps", r"eval_strategy asks for evaluation.*movekd evaluate"),
        ("training.report_to=wandb", r"training\.report_to names 'wandb'"),
        ("training.lr_scheduler_type=sideways", r"training: .*sideways"),
        ("student.vision_feature_layer=-9", r"has 7 hidden states; expected -1 to -6"),
    ],
)
def test_a_value_that_cannot_be_is_a_sentence(digits, tmp_path, key, said):
    with pytest.raises(ConfigError, match=said):
        digits.train(tmp_path, "pretrain", key)


def test_a_transformers_that_would_train_something_else_is_refused(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.18.3")
    with pytest.raises(ConfigError, match=r"transformers is 5\.18\.3; expected 5\.19 or newer"):
        digits.train(tmp_path, "pretrain")


def test_half_precision_weights_train_or_are_refused(digits, tmp_path):
    summary = digits.train(tmp_path, "pretrain", "student.dtype=bfloat16", "training.max_steps=2")
    assert all(0 < step["loss_kd"] < 100 for step in digits.logged(summary))
    with pytest.raises(ConfigError, match=r"student\.dtype is float16.*gradients vanish"):
        digits.config("pretrain", "student.dtype=float16")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 12))
def test_samples_per_step_stay_the_same_in_any_number_of_processes(size, steps, before, now):
    """``size`` at once, accumulated ``steps`` times, in ``before`` processes, then in ``now``."""
    keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    samples = size * steps * before
    config = TrainConfig.model_construct(training=keys | {"learning_rate": 1})
    arguments = SimpleNamespace(train_batch_size=size, world_size=now, **keys)
    if samples % now:
        with pytest.raises(
            ConfigError, match=f"{samples} samples per step.*that divides {samples}"
        ):
            divide_step(config, arguments, samples)
        return
    found = divide_step(config, arguments, samples).training
    divided = SimpleNamespace(
        train_batch_size=found["per_device_train_batch_size"],
        world_size=now,
        gradient_accumulation_steps=found["gradient_accumulation_steps"],
    )
    assert global_batch_size(divided) == samples
    assert found["per_device_train_batch_size"] <= size  # no process needs more memory
    assert found["learning_rate"] == 1
    if now == before:
        assert found["per_device_train_batch_size"] == size
    assert config.training["per_device_train_batch_size"] == size
