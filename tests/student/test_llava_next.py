"""Tests of movekd.student.llava_next: tokens, tiles and answers are those of transformers."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

import scenes
from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError
from movekd.evaluate.generate import generate_answers
from movekd.student.checkpoint import load_parts, part_of, save_parts
from movekd.student.config import MoleKeys, StudentConfig
from movekd.student.llava_next import count_anyres_tokens
from movekd.student.tokenization import tokenize_conversation
from movekd.student.vlm import build_vlm, image_features

WEIGHTS = Path(scenes.__file__).parent / "weights"
SIZES = [(640, 427), (427, 640), (336, 336), (700, 690), (1100, 350), (350, 1100), (90, 40), (3, 9)]
PATCH = 84  # 4 x 4 patches a view


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A CLIP of 336 pixels with random weights, small by its large patches."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tower")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=336,
        patch_size=PATCH,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    LlavaNextImageProcessorPil().save_pretrained(folder)
    return folder


def config(tower, **keys):
    mole = MoleKeys(r=4, lora_alpha=4.0, use_gate=True, init_lora_weights="kaiming")
    paths = {"vision_tower": str(tower), "language_model": str(WEIGHTS / "language_model")}
    return StudentConfig(architecture="llava_next", mole=mole, **(paths | keys))


@pytest.fixture(scope="module")
def student(tower):
    torch.manual_seed(1)
    student = build_vlm(config(tower))
    student.vlm.eval()
    return student


def processor(patch_size=PATCH):
    square = {"height": 336, "width": 336}
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=square),
        AutoTokenizer.from_pretrained(WEIGHTS / "language_model"),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


@pytest.fixture(scope="module")
def photographs():
    """The same photograph in many shapes, PNG bytes."""
    photo, found = Image.fromarray(load_sample_images().images[0]), []
    for size in SIZES:
        buffer = io.BytesIO()
        photo.resize(size).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


@pytest.mark.parametrize("patch_size", [14, 56, 84, 112])
def test_tokens_are_as_many_as_transformers_says(patch_size):
    theirs = processor(patch_size)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1))
    def check(sizes):
        widths, heights = zip(*sizes, strict=True)
        expected = theirs._get_num_multimodal_tokens(list(zip(heights, widths, strict=True)))
        found = count_anyres_tokens(widths, heights, 336 // patch_size)
        assert found.tolist() == expected["num_image_tokens"]

    check()
    assert count_anyres_tokens([640], [427], 24).tolist() == [576 + 32 * 48 + 32]


def test_prompt_and_pixels_are_those_of_the_processor(student, photographs):
    transform, theirs = student.image_transform("stretch"), processor()
    for data in photographs:
        image = Image.open(io.BytesIO(data))
        expected = theirs(images=[image], text=["<image> is there a 3 ?"], return_tensors="np")
        seen = transform.see(data, student.views)
        np.testing.assert_array_equal(seen.pixels_VCHW, expected["pixel_values"][0])
        assert [seen.height, seen.width] == expected["image_sizes"][0].tolist()
        found = student.count_tokens([seen.width], [seen.height])
        image_id = student.tokenizer.convert_tokens_to_ids("<image>")
        assert (expected["input_ids"] == image_id).sum() == found[0]


def test_logits_are_those_of_transformers_own_way_in(student, photographs):
    transform, theirs = student.image_transform("stretch"), processor()
    turns = (("human", "<image>\n<image>"), ("gpt", "a 3"))
    for pair in ((0, 4), (3, 6), (5, 7)):
        images = [Image.open(io.BytesIO(photographs[i])) for i in pair]
        batch = theirs(images=images, text=["<image><image>"], return_tensors="pt")
        seen = [transform.see(photographs[i], student.views) for i in pair]
        counts = student.count_tokens([i.width for i in seen], [i.height for i in seen])
        conversation = Conversation("two", ("a", "b"), turns)
        ids = tokenize_conversation(
            conversation,
            student.tokenizer,
            prompt="plain",
            num_image_tokens=counts.tolist(),
            recipe="revised",
        ).input_ids
        pixels_VCHW = torch.from_numpy(np.concatenate([i.pixels_VCHW for i in seen]))
        with torch.no_grad():
            sizes = [(i.height, i.width) for i in seen]
            output, tokens_VND = image_features(student.vlm, pixels_VCHW, sizes)
            ours = student.vlm(
                input_ids=torch.tensor([ids]), mm_encoder_outputs={"image": output}
            ).logits
            expected = student.vlm(
                input_ids=torch.tensor([ids]),
                pixel_values=batch["pixel_values"],
                image_sizes=batch["image_sizes"],
            ).logits
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert tokens_VND.shape == (len(pixels_VCHW), 16, 32)


def test_answers_are_those_of_greedy_search_without_padding(student, photographs):
    def ask(number, text):
        return Conversation(str(number), (str(number),), (("human", f"<image>\n{text}"),))

    questions = [
        ask(0, "What is the sum?"),
        ask(4, "Is there a 3?"),
        ask(7, "What is the largest?"),
    ]
    questions.append(Conversation("text", (), (("human", "What is the sum of 1, 2?"),)))
    keys = {"prompt": "chat_template", "geometry": "stretch", "max_new_tokens": 5}

    def answers(batch_size):
        read = lambda name: photographs[int(name)]  # noqa: E731
        return list(generate_answers(student, questions, read, batch_size=batch_size, **keys))

    assert answers(1) == answers(4)
    theirs, image = processor(), Image.open(io.BytesIO(photographs[0]))
    text = student.tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat is the sum?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    batch = theirs(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
    generated = student.vlm.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"],
        image_sizes=batch["image_sizes"],
        do_sample=False,
        max_new_tokens=5,
        pad_token_id=student.tokenizer.pad_token_id,
    )
    new = generated[:, batch["input_ids"].shape[1] :]
    expected = student.tokenizer.decode(new[0], skip_special_tokens=True).strip()
    assert answers(1)[0] == expected


def test_line_ends_are_saved_with_the_projector(student, tower, tmp_path):
    assert part_of("model.image_newline") == "projector"
    save_parts(tmp_path, student.vlm, ["projector"])
    torch.manual_seed(2)
    other = build_vlm(config(tower)).vlm
    assert not torch.equal(other.model.image_newline, student.vlm.model.image_newline)
    assert other.model.image_newline.std().item() == pytest.approx(
        other.config.text_config.hidden_size**-0.5, rel=0.3
    )
    load_parts(tmp_path, other)
    assert torch.equal(other.model.image_newline, student.vlm.model.image_newline)


def test_a_tower_of_another_size_is_refused():
    with pytest.raises(ConfigError, match=r"clip' looks at 48 pixels; .*cuts tiles of 336"):
        build_vlm(config(WEIGHTS / "clip"))
