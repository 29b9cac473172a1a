"""Packed samples train a stock language model as the same samples do one by one.

The models are transformers' own classes, small and random. What is packed is what the collator
gives: positions that start again in each sample, no mask, no label on a first token.
"""

import pytest
import torch
from transformers import (
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

from movekd.student.tokenization import IGNORED
from movekd.train.data import Collator, Sample
from movekd.train.packed_data import join
from movekd.train.packing_keys import PACKABLE
from small_language_model import KINDS, SIZES

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


def test_every_kind_that_may_be_packed_is_compared_here():
    found = {config.model_type for _, config, _ in MODELS.values()}
    assert found == set(PACKABLE)
