"""Refuse LoRA and 4-bit weights of the language model where they cannot do what they are for.

Input: the resolved run. Used by ``config.load_config``, and by ``run`` for what is only known with
the arguments of transformers.
"""

from typing import TYPE_CHECKING

from movekd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from movekd.train.config import TrainConfig


def check_language_model_keys(config: "TrainConfig") -> None:
    """Refuse LoRA or 4-bit weights where they cannot do what they are for.

    Raises:
        ConfigError: names the key, and what to change.
    """
    student = config.student
    given = [
        key
        for key, value in (
            ("language_model_lora", student.language_model_lora),
            ("load_in_4bit", student.load_in_4bit),
        )
        if value
    ]
    if not given:
        return
    if config.stage == "distill":
        raise ConfigError(
            f"student.{given[0]} is set, but stage: distill loads no language model; expected it "
            "in stage pretrain or finetune. Leave it out."
        )
    learns = "language_model" in (config.trained or [])
    if student.language_model_lora is not None and not learns:
        raise ConfigError(
            "student.language_model_lora is set, but trained does not name language_model, so the "
            f"adapter would learn nothing (stage {config.stage} trains "
            f"{', '.join(config.trained or [])}). Add language_model to trained; or leave "
            "language_model_lora out, and an adapter of init_from is merged into the weights."
        )
    if student.load_in_4bit and student.language_model_lora is None and learns:
        raise ConfigError(
            "student.load_in_4bit is true and trained names language_model, but 4-bit weights "
            "cannot learn. Set student.language_model_lora: {}, which trains an adapter beside "
            "them; or take language_model out of trained."
        )


def refuse_sharding_in_4bit(config: "TrainConfig", arguments: "TrainingArguments") -> None:
    """Refuse FSDP and DeepSpeed for 4-bit weights, which neither divides between processes here.

    Raises:
        ConfigError: names both keys.
    """
    from movekd.train.fsdp import is_fsdp_asked_for  # loads transformers

    found = "FSDP" if is_fsdp_asked_for(arguments) else "DeepSpeed" if arguments.deepspeed else None
    if config.student.load_in_4bit and found is not None:
        raise ConfigError(
            f"{found} is asked for and student.load_in_4bit is true; expected one of them, because "
            "4-bit weights are not divided between processes. Every GPU holds all of them: use "
            "torchrun without it, or set load_in_4bit: false."
        )
