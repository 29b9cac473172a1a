"""Train the small language model of the embedded corpus, with its tokenizer.

Input: the texts of ``scenes.py``, and grids of digit words in place of images: 36 words, the digit
that covers each patch or ``empty``. Output: a word-level ``PreTrainedTokenizerFast`` with a short
chat template, and a ``LlamaForCausalLM``. Used by ``pretrain.py``.

A language model must know what the answers mean before it sees an image. A large one has read the
web; this one reads grids of digit words. Its accuracy on true grids limits that of a student.

Dimensions: B texts, T tokens, C cells, G grid side, Q questions, M cell masks.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scenes import (
    EMPTY,
    QUESTION_TYPES,
    Ints,
    Scenes,
    ask,
    caption,
    draw_digits,
    grid_labels,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
WORDS = [
    *("a", "at", "there", "is", "the", "top", "bottom", "left", "right", "which", "digit", "what"),
    *("sum", "of", "digits", "largest", "empty", "yes", "no", "?", ",", "."),
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}ASSISTANT: {% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
GRID_WORDS = [*map(str, range(10)), "empty"]  # the index is the grid label


def build_tokenizer() -> Any:
    """Return the tokenizer: lower case, a token per word, a token per number from 0 to 36.

    ``tokenizer(text)`` adds ``<s>`` in front; the chat template contains it.
    """
    vocabulary = [*SPECIAL, *WORDS, *map(str, range(37))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any) -> Any:
    """Return the untrained language model, about 450 thousand parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def cell_masks(scenes: Scenes) -> Ints:
    """Return masks_M33: which of a cell's nine patches its digit covers, over all filled cells."""
    covered_BGG = (grid_labels(scenes) < 10).astype(np.int64)
    cells_BC33 = covered_BGG.reshape(-1, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 3, 3)
    return np.asarray(cells_BC33[scenes.digits_BC != EMPTY], np.int64)


def grid_text(
    digits_BC: Ints, masks_M33: Ints, rng: np.random.Generator, noise: float
) -> list[str]:
    """Return 36 words per scene, row by row; replace up to a share ``noise`` of them at random."""
    masks_BC33 = masks_M33[rng.integers(0, len(masks_M33), digits_BC.shape)]
    is_covered = (masks_BC33 > 0) & (digits_BC[..., None, None] != EMPTY)
    labels_BC33 = np.where(is_covered, digits_BC[..., None, None], 10)
    labels_BGG = labels_BC33.reshape(-1, 2, 2, 3, 3).transpose(0, 1, 3, 2, 4).reshape(-1, 36)
    is_wrong = rng.random(labels_BGG.shape) < noise * rng.random((len(digits_BC), 1))
    labels_BGG = np.where(is_wrong, rng.integers(0, 11, labels_BGG.shape), labels_BGG)
    return [" ".join(GRID_WORDS[label] for label in row) for row in labels_BGG]


def chat_text(image: str, questions: list[tuple[str, str]]) -> str:
    """Return a conversation as the chat template writes it, ``image`` before its first question."""
    turns = [f"USER: {q} ASSISTANT: {a}</s>" for q, a in questions]
    turns[0] = turns[0].replace("USER: ", f"USER: {image}\n", 1)
    return "<s>" + "".join(turns)


def training_texts(
    masks_M33: Ints, batch_size: int, rng: np.random.Generator, turns: int, noise: float
) -> list[str]:
    """Return ``batch_size`` texts about new scenes: a quarter are captions, the others chats."""
    half = batch_size // 2
    digits_BC = np.concatenate(
        [draw_digits(half, rng), draw_digits(batch_size - half, rng, "largest")]
    )
    texts = []
    for i, grid in enumerate(grid_text(digits_BC, masks_M33, rng, noise)):
        if i % 4 == 0:
            texts.append(f"<s>{grid} {caption(digits_BC[i])}</s>")
            continue
        kinds = rng.permutation(turns) % len(QUESTION_TYPES)
        texts.append(chat_text(grid, [ask(QUESTION_TYPES[k], digits_BC[i], rng) for k in kinds]))
    return texts


def encode(texts: list[str], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids_BT, right-padded, and labels_BT: caption or answers, -100 elsewhere."""
    ids_BT = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
    user, assistant = tokenizer.convert_tokens_to_ids(["USER:", "ASSISTANT:"])
    started_BT = (ids_BT == assistant).cumsum(1) - (ids_BT == assistant).long()
    ended_BT = (ids_BT == tokenizer.eos_token_id).cumsum(1)
    ended_BT = ended_BT - (ids_BT == tokenizer.eos_token_id).long()
    is_answer_BT = started_BT > ended_BT
    is_caption_B = ids_BT[:, 1] != user
    is_answer_BT[is_caption_B, 1 + 36 :] = True
    is_answer_BT &= ids_BT != tokenizer.pad_token_id
    return ids_BT, ids_BT.masked_fill(~is_answer_BT, -100)


def train_language_model(
    masks_M33: Ints, steps: int, seed: int, lr: float = 2e-3, batch_size: int = 48
) -> tuple[Any, Any]:
    """Train and print the progress; return the model and its tokenizer."""
    rng = np.random.default_rng([seed, 100])
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    for step in range(1, steps + 1):
        texts = training_texts(masks_M33, batch_size, rng, turns=8, noise=0.3)
        ids_BT, labels_BT = encode(texts, tokenizer)
        hidden_BTD = model.model(ids_BT).last_hidden_state[:, :-1]
        wanted_BT = labels_BT[:, 1:] != -100
        loss: torch.Tensor = F.cross_entropy(
            model.lm_head(hidden_BTD[wanted_BT]), labels_BT[:, 1:][wanted_BT]
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"language_model step {step}: loss {loss.item():.3f}", flush=True)
    return model, tokenizer


@torch.no_grad()
def answer_accuracy(
    model: Any, tokenizer: Any, masks_M33: Ints, num_scenes: int, seed: int
) -> dict[str, float]:
    """Return the accuracy of first answers given true grids, per question type and ``all``.

    An answer is right if each of its tokens is the model's most likely one.
    """
    rng = np.random.default_rng([seed, 101])
    accuracy = {}
    for kind in QUESTION_TYPES:
        digits_BC = draw_digits(num_scenes, rng, kind)
        grids = grid_text(digits_BC, masks_M33, rng, noise=0.0)
        texts = [
            chat_text(grid, [ask(kind, digits_C, rng)])
            for grid, digits_C in zip(grids, digits_BC, strict=True)
        ]
        ids_BT, labels_BT = encode(texts, tokenizer)
        guess_BT = model(ids_BT).logits[:, :-1].argmax(-1)
        is_right_BT = (guess_BT == labels_BT[:, 1:]) | (labels_BT[:, 1:] == -100)
        accuracy[kind] = is_right_BT.all(1).float().mean().item()
    return {**accuracy, "all": sum(accuracy.values()) / len(accuracy)}
