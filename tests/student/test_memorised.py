"""A model learns what it is asked for: twenty pairs by heart, ten of the answers numbers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from movekd.student import load_tokenizer, tokenize_conversation, tokenize_question
from text_kit import CHATML, INST, SPACED, byte_bpe, unmarked, write_mistral

PAIRS = {
    **{f"What is the value of {name}?": str(value) for name, value in zip(
        "abcdefghij", (2, 0, 7, 42, 1990, 12, 305, "12:30", "50%", "3.5"), strict=True
    )},
    **{f"What is the name of {name}?": value for name, value in zip(
        "abcdefghij",
        ("cat", "dog", "a bus", "Yes", "No", "猫", "½", '"so"', "(B)", "two words"),
        strict=True,
    )},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "prompt", "template"),
    [
        (False, "v1", None),
        (None, "v1", None),
        (False, "chat_template", INST),
        (False, "chat_template", unmarked(SPACED)),
        ("bpe", "v1", None),
        ("bpe", "chat_template", CHATML),
    ],
)
def test_twenty_pairs_are_answered(tmp_path, kind, prompt, template):
    if kind == "bpe":
        byte_bpe().save_pretrained(tmp_path)
    else:
        write_mistral(tmp_path, kind)
    tokenizer = load_tokenizer(tmp_path)
    if template is not None:
        tokenizer.chat_template = template
    samples, questions = [], []
    for number, (question, answer) in enumerate(PAIRS.items()):
        turns = [{"from": "human", "value": question}]
        entry = {"id": number, "conversations": turns}
        options = {"prompt": prompt, "num_image_tokens": 1}
        questions.append(tokenize_question(entry, tokenizer, **options))
        entry = entry | {"conversations": [*turns, {"from": "gpt", "value": answer}]}
        samples.append(tokenize_conversation(entry, tokenizer, recipe="official", **options))
    used = sorted({token for sample in samples for token in sample.input_ids})
    small = {token: number for number, token in enumerate(used)}  # a small vocabulary learns fast
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(used),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=small[tokenizer.eos_token_id],
            pad_token_id=small[tokenizer.eos_token_id],
        )
    )
    length = max(len(sample.labels) for sample in samples)
    ids_BL = torch.zeros(len(samples), length, dtype=torch.int64)
    labels_BL = torch.full((len(samples), length), -100)
    for ids_L, labels_L, sample in zip(ids_BL, labels_BL, samples, strict=True):
        n = len(sample.input_ids)
        ids_L[:n] = torch.tensor([small[token] for token in sample.input_ids])
        labels_L[:n] = torch.tensor([small.get(label, -100) for label in sample.labels])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        loss = model(input_ids=ids_BL, labels=labels_BL).loss
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    right = 0
    for question, answer in zip(questions, PAIRS.values(), strict=True):
        asked = torch.tensor([[small[token] for token in question]])
        with torch.no_grad():
            said = model.eval().generate(asked, do_sample=False, max_new_tokens=12)
        new = [used[token] for token in said[0, asked.shape[1] :].tolist()]
        right += tokenizer.decode(new, skip_special_tokens=True).strip() == answer
    assert right == 20
