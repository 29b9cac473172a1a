"""Tests of movekd.train.language_model_keys: LoRA and 4 bit where they cannot work."""

from types import SimpleNamespace

import pytest

from movekd.errors import ConfigError
from movekd.train.language_model_keys import refuse_sharding_in_4bit

LORA = "student.language_model_lora={r: 4}"
IN_4BIT = "student.load_in_4bit=true"


@pytest.mark.parametrize(
    ("stage", "overrides", "said"),
    [
        ("distill", [LORA], r"language_model_lora is set, but stage: distill loads no"),
        ("distill", [IN_4BIT], r"load_in_4bit is set, but stage: distill loads no"),
        ("pretrain", [LORA], r"trained does not name language_model.*stage pretrain trains mole"),
        ("finetune", [LORA, "trained=[projector]"], r"Add language_model to trained"),
        ("finetune", [IN_4BIT], r"4-bit weights cannot learn.*language_model_lora: \{\}"),
        ("finetune", [IN_4BIT, LORA, "student.dtype=float16"], r"student\.dtype is float16"),
        ("finetune", ["student.language_model_lora={r: 0}"], r"language_model_lora\.r"),
        ("finetune", ["student.language_model_lora={rank: 4}"], r"language_model_lora\.rank"),
        ("finetune", ["student.language_model_lora={target_modules: []}"], r"target_modules"),
        ("finetune", ["student.language_model_lora={lora_dropout: 1}"], r"lora_dropout"),
        ("finetune", ["student.load_in_4bit=4"], r"load_in_4bit"),
    ],
)
def test_what_cannot_work_is_refused(digits, stage, overrides, said):
    with pytest.raises(ConfigError, match=said):
        digits.config(stage, *overrides)


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("finetune", [LORA]),
        ("finetune", [LORA, IN_4BIT]),
        ("finetune", [IN_4BIT, "trained=[mole, projector]"]),
        ("pretrain", [IN_4BIT]),
        ("pretrain", [LORA, "trained=[projector, language_model]"]),
    ],
)
def test_what_can_work_is_not(digits, stage, overrides):
    digits.config(stage, *overrides)


def test_llavas_values_are_the_defaults(digits):
    lora = digits.config("finetune", "student.language_model_lora={}").student.language_model_lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (128, 256, 0.05)
    assert lora.target_modules == "all-linear"


@pytest.mark.parametrize(("fsdp", "deepspeed"), [("full_shard", None), ("", "zero3.json")])
def test_4_bit_weights_are_not_sharded(digits, fsdp, deepspeed):
    arguments = SimpleNamespace(fsdp=fsdp, deepspeed=deepspeed)
    refuse_sharding_in_4bit(digits.config("finetune", LORA), arguments)
    with pytest.raises(ConfigError, match=r"(FSDP|DeepSpeed) is asked for and student\.load_in"):
        refuse_sharding_in_4bit(digits.config("finetune", LORA, IN_4BIT), arguments)
