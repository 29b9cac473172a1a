"""Load a causal language model and its tokenizer, in full or in 4 bit.

Input: the ``student:`` keys. Output: transformers' model with a row for every token. Used by
``vlm.build_vlm``. In 4 bit (QLoRA), bitsandbytes holds the weights of the linear layers as NF4,
with their scales quantised once more; embeddings, norms and the output layer keep their dtype. A
4-bit weight is fixed: it neither learns nor takes other values.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from movekd.errors import ConfigError, shorten
from movekd.student.config import StudentConfig
from movekd.student.hf_loading import load_kwargs, loading, require_whole
from movekd.student.language_lora import target_modules
from movekd.student.output_layer import require_plain_output, require_text_model
from movekd.student.tokenizer import load_tokenizer

OLDEST_BITSANDBYTES = (0, 50)
"""Older versions compute in 4 bit only on some GPUs."""


def check_language_model(config: StudentConfig) -> None:
    """Check the keys of the language model before any weights are read.

    Raises:
        ConfigError: none is given; it has a vision tower; its weights are quantised already;
            ``target_modules`` names what it does not have; or ``load_in_4bit`` is set without
            bitsandbytes.
        WeightsError: its config cannot be found.
    """
    if config.language_model is None:
        raise ConfigError(
            "student.language_model is null: this is an encoder of stage: distill, which neither "
            "reads nor answers text. Give it to a stage: pretrain as init_from first."
        )
    if config.load_in_4bit:
        require_bitsandbytes()
    with loading(config.language_model, "student.language_model"):
        keys = AutoConfig.from_pretrained(config.language_model, trust_remote_code=False)
    require_text_model(keys.model_type, config.language_model)
    if getattr(keys, "quantization_config", None) is not None:
        raise ConfigError(
            f"student.language_model '{shorten(config.language_model)}' holds quantised weights, "
            "which neither learn nor merge with an adapter; expected the model that they were made "
            "from. With student.load_in_4bit: true, movekd quantises that one."
        )
    if config.language_model_lora is not None:
        with loading(config.language_model, "student.language_model"), torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(keys, trust_remote_code=False)
        if hasattr(skeleton, "model"):  # without it, ``require_plain_output`` refuses the model
            target_modules(skeleton.model, config.language_model_lora)


def load_language_model(config: StudentConfig) -> tuple[Any, Any]:
    """Return the language model and its tokenizer, which knows ``<image>``.

    Raises:
        WeightsError: it cannot be found, or lacks weights.
        ConfigError: LLaVA would leave out a part of it, see ``output_layer``.
    """
    assert config.language_model is not None
    kwargs = load_kwargs(config)
    if config.load_in_4bit:
        kwargs["quantization_config"] = _in_4bit(config)
    with loading(config.language_model, "student.language_model"):
        language_model, info = AutoModelForCausalLM.from_pretrained(config.language_model, **kwargs)
    require_whole(info, config.language_model, "student.language_model")
    require_plain_output(language_model, config.language_model)
    tokenizer = load_tokenizer(config.language_model, key="student.language_model")
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if config.load_in_4bit:
        language_model.model.is_loaded_in_4bit = True  # PEFT and ``is_in_4bit`` read it there
        for module in language_model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # in evaluation on some CPUs, bitsandbytes would pack the weights anew, round their
                # scales to bfloat16, and refuse widths that 64 does not divide
                module.support_avx512bf16_for_cpu = False
    return language_model, tokenizer


def is_in_4bit(vlm: Any) -> bool:
    """Return whether the linear layers of a LLaVA's language model are in 4 bit."""
    language_model = getattr(vlm.model, "language_model", None)  # an encoder has none
    return bool(getattr(language_model, "is_loaded_in_4bit", False))


def require_bitsandbytes() -> None:
    """Refuse 4-bit weights where bitsandbytes cannot compute with them.

    Raises:
        ConfigError: it is missing or too old.
    """
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        found = "not installed"
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_BITSANDBYTES:
        oldest = ".".join(map(str, OLDEST_BITSANDBYTES))
        raise ConfigError(
            f"student.load_in_4bit needs bitsandbytes {oldest} or newer, which is {found}; "
            "pip install 'movekd[qlora]', or set load_in_4bit: false. `movekd export` needs none."
        )


def _in_4bit(config: StudentConfig) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
