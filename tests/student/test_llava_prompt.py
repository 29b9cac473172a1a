"""An imported checkpoint and its Hugging Face export read the prompt that LLaVA wrote for it."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor

from exports import export
from movekd.student import tokenize_conversation, tokenize_question
from movekd.student.checkpoint import load_student
from movekd.student.official.import_checkpoint import import_official
from movekd.student.vlm import image_features
from text_kit import LLAVA_NAMES, llava_conversations, llava_tokens, write_mistral

ONE_IMAGE = [c for c in llava_conversations("v1") if "image" in c and "long" not in c["id"]]


@pytest.fixture(scope="module", params=list(LLAVA_NAMES))
def imported(request, kit, tmp_path_factory):
    """Name of LLaVA's answers, a student imported from a checkpoint with that tokenizer, and it."""
    folder = tmp_path_factory.mktemp("llava")
    source = kit.write_released(folder)
    for path in source.glob("tokenizer*"):
        path.unlink()
    write_mistral(source, LLAVA_NAMES[request.param])
    keys = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(keys | {"vocab_size": 32_000}))
    state = kit.released_state(dtype=torch.float32, vocab_size=32_000)
    save_file(state, source / "model.safetensors")
    import_official(source, folder / "imported")
    return request.param, load_student(folder / "imported"), state


def first_question(conversation):
    """Return the conversation up to its first question."""
    turns = conversation["conversations"]
    start = 1 if turns[0]["from"] == "gpt" else 0
    return conversation | {"conversations": turns[start : start + 1]}


def llavas_question(expected):
    """Return LLaVA's tokens up to the first one that it labels."""
    start = next(i for i, label in enumerate(expected["labels"]) if label != -100)
    return expected["input_ids"][:start]


def test_logits_are_those_of_the_released_prompt(imported):
    name, trained, state = imported
    vlm = trained.student.vlm
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, 16, 16)
    num_compared = 0
    with torch.inference_mode():
        image, _ = image_features(vlm, pixels)
        for conversation in ONE_IMAGE:
            expected = llava_tokens(name, "v1", conversation["id"])
            if "warning" in expected or "empty-answer" in conversation["id"]:
                continue  # LLaVA labels nothing, or not the first answer
            theirs = torch.tensor(llavas_question(expected))
            at = theirs.tolist().index(-200)
            embedded = [
                state["model.embed_tokens.weight"][theirs[:at]],
                image.pooler_output[0],
                state["model.embed_tokens.weight"][theirs[at + 1 :]],
            ]
            hidden = vlm.model.language_model(inputs_embeds=torch.cat(embedded)[None])
            logits = hidden.last_hidden_state[0, -1] @ state["lm_head.weight"].T
            ours = tokenize_question(
                first_question(conversation),
                trained.student.tokenizer,
                prompt="v1",
                num_image_tokens=4,
            )
            found = vlm(input_ids=torch.tensor([ours]), pixel_values=pixels).logits[0, -1]
            torch.testing.assert_close(found[:32_000], logits, rtol=1e-5, atol=1e-5)
            num_compared += 1
    assert num_compared >= 25


def as_messages(turns):
    """Return LLaVA's turns in the form that processors take."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = []
    for turn in turns:
        text = turn["value"]
        parts = [{"type": "text", "text": text.replace("<image>", "").strip()}]
        if "<image>" in text:
            parts.insert(0, {"type": "image"})
        else:
            parts[0]["text"] = text
        messages.append({"role": roles[turn["from"]], "content": parts})
    return messages


def test_the_exported_processor_gives_the_tokens_of_the_training(imported, tmp_path):
    _, trained, _ = imported
    export(trained, "hf", tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.new("RGB", (20, 16))
    tokenizer = trained.student.tokenizer
    for conversation in llava_conversations("v1"):
        turns = conversation["conversations"]
        images = {"images": picture} if "image" in conversation else {}
        options = {"prompt": "v1", "num_image_tokens": 4}
        whole = tokenize_conversation(conversation, tokenizer, recipe="revised", **options)
        text = processor.apply_chat_template(as_messages(turns))
        assert processor(text=text, **images)["input_ids"][0] == whole.input_ids, text
        asked = conversation | {"conversations": turns[:-1]}
        text = processor.apply_chat_template(as_messages(turns[:-1]), add_generation_prompt=True)
        question = tokenize_question(asked, tokenizer, **options)
        assert processor(text=text, **images)["input_ids"][0] == question


def test_the_released_code_gets_its_tokenizer_model_back(imported, tmp_path):
    _, trained, _ = imported
    export(trained, "official", tmp_path / "official")
    names = {path.name for path in (tmp_path / "official").iterdir()}
    assert {"tokenizer.model", "tokenizer_config.json"} <= names
    assert "tokenizer.json" not in names
