"""Packed samples train a stock language model as the same samples do one by one.

The models are transformers' own classes, small and random. What is packed is what the collator
gives: positions that start again in each sample, no mask, no label on a first token.
"""

from functools import wraps
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    MinistralConfig,
    MinistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from movekd.student.tokenization import IGNORED
from movekd.train.data import Collator, Sample
from movekd.train.packed_data import join
from movekd.train.packing_keys import PACKABLE
from small_language_model import KINDS, SIZES

CPU = "flash_attention_of_the_tests"
VOCABULARY = 64
EXPERTS = {"num_experts_per_tok": 2}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS = {
    name: (KINDS[kind].model, KINDS[kind].config, KINDS[kind].keys)
    for name, kind in (
        *(("llama", "llama3"), ("smollm2", "smollm2"), ("mistral", "mistral")),
        *(("qwen3", "qwen3"), ("gemma3_text", "gemma3"), ("smollm3", "smollm3")),
    )
} | {
    "ministral": (MinistralForCausalLM, MinistralConfig, {"head_dim": 8} | WINDOWS),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 3} | EXPERTS),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True} | WINDOWS),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"head_dim": 8, "num_experts": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
        | EXPERTS,
    ),
}
FAST = ("llama", "qwen3", "gemma3_text", "smollm3")
LENGTHS = (23, 1, 11, 30, 2, 17, 9)
ROWS = ((0, 1, 2), (3, 4), (5, 6))  # of 35, 32 and 26 tokens: two of them are padded
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(name, attention):
    model, config, keys = MODELS[name]
    torch.manual_seed(5)
    keys = SIZES | IDS | keys | {"vocab_size": VOCABULARY, "attn_implementation": attention}
    built = model(config(**keys))
    assert built.config._attn_implementation == attention
    return built


def samples():
    """Return samples of which about every second token has a label, the first one included."""
    random = torch.Generator().manual_seed(1)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, VOCABULARY, (length,), generator=random).tolist()
        labels = [token if (number + at) % 2 else IGNORED for at, token in enumerate(ids)]
        found.append(Sample(f"sample {number}", ids, labels, [], []))
    return found


def loss_and_gradients(model, batches):
    """Return the mean loss over the answer tokens of all batches, and its gradients."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        one = torch.ones(())
        total = total + model(**batch, num_items_in_batch=one, use_cache=False).loss
        count += int(batch["labels"][:, 1:].ne(IGNORED).sum())
    model.zero_grad()
    (total / count).backward()
    return total.detach() / count, count, {n: p.grad.clone() for n, p in model.named_parameters()}


def one_by_one(samples):
    """Return a batch of each sample that a token is predicted of."""
    keys = ("input_ids", "labels")
    return [
        {key: torch.tensor([getattr(sample, key)]) for key in keys}
        for sample in samples
        if len(sample.input_ids) > 1
    ]


def collated(samples):
    """Return the language model's part of a batch, as ``DistillModel.forward`` passes it."""
    batch = Collator(None, None, None, (), pad_token_id=0)(samples)
    return {key: batch[key] for key in ("input_ids", "labels", "position_ids")}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_packed_loss_and_gradients_are_those_of_single_samples(name, attention):
    model, single = build(name, attention), samples()
    packed = collated([join([single[at] for at in row]) for row in ROWS])
    expected, num_expected, expected_gradients = loss_and_gradients(model, one_by_one(single))
    found, num_found, gradients = loss_and_gradients(model, [packed])
    assert num_found == num_expected
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    for parameter, gradient in gradients.items():
        difference = (gradient - expected_gradients[parameter]).abs().max()
        assert difference <= 1e-5 * min(scale, 1), parameter
    mixed = packed | {"position_ids": torch.arange(packed["input_ids"].shape[1])[None]}
    other, _, _ = loss_and_gradients(model, [mixed])
    assert abs(other - expected) > 1e-3  # samples that see each other are another loss


def flash(query, key, value, softmax_scale=None, causal=True, window_size=(-1, -1), **kwargs):
    """Return what flash-attn's function of this name does, for (batch, token, head, channel)."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    at = torch.arange(query.shape[2])
    seen = at[:, None] >= at
    if window_size[0] >= 0:
        seen &= at[:, None] - at <= window_size[0]
    scaled = {"attn_mask": seen, "scale": softmax_scale}
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **scaled).transpose(
        1, 2
    )


def flash_varlen(query, key, value, cu_seqlens_q, softmax_scale, window_size=(-1, -1), **kwargs):
    """Return the same for sequences that follow one another, (token, head, channel)."""
    parts = [
        flash(
            *(part[None, start:end] for part in (query, key, value)),
            softmax_scale,
            True,
            window_size,
        )
        for start, end in pairwise(cu_seqlens_q.tolist())
    ]
    return torch.cat(parts, dim=1)[0]


@pytest.fixture
def flash_on_cpu(monkeypatch):
    """Register transformers' flash attention under another name, with a kernel for CPUs."""
    calls = []

    @wraps(flash_varlen)  # transformers looks at its arguments
    def varlen(*tensors, **keys):
        calls.append(keys["cu_seqlens_q"].tolist())
        return flash_varlen(*tensors, **keys)

    def functions(*args, **kwargs):
        return flash, varlen, None, flash_utils._pad_input, flash_utils._unpad_input

    monkeypatch.setattr(flash_utils, "_lazy_imports", functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    AttentionInterface.register(CPU, flash_attention_forward)
    AttentionMaskInterface.register(CPU, flash_attention_mask)
    return calls


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_flash_attention_is_given_where_each_sample_of_a_row_starts(flash_on_cpu, name):
    """transformers' way to the kernel is real; the kernel is PyTorch's, as no GPU is here."""
    model, single = build(name, "sdpa"), samples()
    expected = loss_and_gradients(model, one_by_one(single))
    model.set_attn_implementation(CPU)
    rows = [collated([join([single[at] for at in row])]) for row in ROWS]
    found = loss_and_gradients(model, rows)
    starts = [[0, *np.cumsum([LENGTHS[at] for at in row]).tolist()] for row in ROWS]
    num_layers = model.config.num_hidden_layers
    assert flash_on_cpu == [start for start in starts for _ in range(num_layers)]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for parameter, gradient in found[2].items():
        assert (gradient - expected[2][parameter]).abs().max() <= 1e-5, parameter


def test_every_kind_that_may_be_packed_is_compared_here():
    found = {config.model_type for _, config, _ in MODELS.values()}
    assert found == set(PACKABLE)
