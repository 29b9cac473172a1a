"""Refuse `data.packing` where samples in one row would not be told apart, or would mean nothing.

Input: the resolved run. Used by ``config.load_config`` for what the keys say, and by ``run`` for
what the config.json of the language model says.
"""

from typing import TYPE_CHECKING

from movekd.errors import ConfigError, shorten

if TYPE_CHECKING:
    from movekd.train.config import TrainConfig

PACKABLE = (
    *("gemma3_text", "llama", "ministral", "mistral", "mixtral", "olmo2", "qwen2", "qwen3"),
    *("qwen3_moe", "smollm3"),
)
"""`model_type` of language models whose loss and gradients are those of unpacked samples.

SmolLM, SmolLM2 and Vicuna are of type llama. ``tests/train/test_packed_language_models.py`` trains
each one. A language model that does not read positions, or that carries a state from token to token
(Mamba), would mix samples without an error.
"""


def check_packing_keys(config: "TrainConfig") -> None:
    """Refuse combinations of keys that cannot be packed.

    Raises:
        ConfigError: names the key, the reason, and what to write instead.
    """
    if not config.data.packing:
        return
    if config.stage == "distill":
        raise ConfigError(
            "data.packing puts several conversations into a row of tokens, and stage: distill "
            "reads no text; expected it in stage pretrain or finetune. Leave it out."
        )
    if config.data.group_by_modality_length:
        raise ConfigError(
            "data.packing and data.group_by_modality_length are both true; expected one of them, "
            "because a row of packed samples mixes images and text, and rows are about equally "
            "long. Set group_by_modality_length: false."
        )
    size = config.training.get("per_device_train_batch_size", 8)
    if config.student.attn_implementation == "flash_attention_2" and size != 1:
        raise ConfigError(
            f"data.packing with student.attn_implementation: flash_attention_2 and "
            f"training.per_device_train_batch_size {size}; expected 1, because transformers tells "
            "packed samples apart for flash attention only in a batch of one row. Set it to 1, and "
            f"multiply gradient_accumulation_steps by {size}; or take attn_implementation: sdpa."
        )


def require_packable(config: "TrainConfig") -> None:
    """Refuse to pack for a language model that nobody has compared; reads only its config.json.

    Raises:
        ConfigError: names the kind of language model.
        WeightsError: its config cannot be found.
    """
    from transformers import AutoConfig

    from movekd.student.hf_loading import loading

    source = config.student.language_model
    assert source is not None  # checked with the config
    with loading(source, "student.language_model"):
        found = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    if found not in PACKABLE:
        raise ConfigError(
            f"data.packing is true, and student.language_model '{shorten(source)}' is of type "
            f"{shorten(repr(found), 80)}; expected one that is known to keep packed samples apart: "
            f"{', '.join(PACKABLE)}. Set data.packing: false, or take another language model."
        )
