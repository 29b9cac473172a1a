"""Tests of movekd.evaluate.generate: answers of a real small model to real scenes."""

import json
from pathlib import Path

import pytest
import torch

import scenes
from movekd.corpus.conversations import Conversation, load_conversations
from movekd.errors import ConfigError
from movekd.evaluate.exact_match import split_questions
from movekd.evaluate.generate import generate_answers
from movekd.evaluate.image_folder import read_from_folder
from movekd.student.config import MoleKeys, StudentConfig
from movekd.student.vlm import build_vlm

WEIGHTS = Path(scenes.__file__).parent / "weights"


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    config = StudentConfig(
        vision_tower=str(WEIGHTS / "clip"),
        language_model=str(WEIGHTS / "language_model"),
        mole=MoleKeys(r=4, lora_alpha=4.0, use_gate=True, init_lora_weights="zero"),
    )
    student = build_vlm(config)
    student.vlm.eval()
    return student


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Questions of unequal length, one of them text only, and their images' reader."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write_corpus(folder, num_pretrain=1, num_finetune=1, num_val=1, num_test=7, seed=5)
    questions, _ = split_questions(load_conversations(folder / "test.json"))
    text = Conversation("text", (), (("human", "What is the sum of 1, 2, 3, 4, 5?"),))
    return [*questions[:3], text, *questions[3:]], read_from_folder(folder / "images")


def answers(student, asked, **keys):
    questions, read = asked
    defaults = {"prompt": "chat_template", "geometry": "crop", "max_new_tokens": 6}
    return list(generate_answers(student, questions, read, **(defaults | keys)))


def test_answers_come_in_order_whatever_the_batch_size(student, asked):
    alone = answers(student, asked, batch_size=1)
    assert len(alone) == 8
    for batch_size in (3, 8, 32):
        assert answers(student, asked, batch_size=batch_size) == alone
    questions, read = asked
    backwards = answers(student, (questions[::-1], read), batch_size=3)
    assert backwards[::-1] == alone


def test_answers_are_those_of_greedy_search_without_padding(student, asked):
    questions, read = asked
    transform = student.image_transform("crop")
    from movekd.student.tokenization import tokenize_question

    for question, found in zip(questions, answers(student, asked), strict=True):
        ids = tokenize_question(
            question, student.tokenizer, prompt="chat_template", num_image_tokens=36
        )
        pixels = [torch.from_numpy(transform(read(name))) for name in question.images]
        start = len(ids)
        with torch.no_grad():
            for _ in range(6):
                image = {"pixel_values": torch.stack(pixels)} if pixels else {}
                logits = student.vlm(input_ids=torch.tensor([ids]), **image).logits
                ids.append(int(logits[0, -1].argmax()))
                if ids[-1] == student.tokenizer.eos_token_id:
                    break
        assert found == student.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_a_question_without_a_place_for_its_image_is_named(student, asked):
    odd = Conversation("odd", ("test_00000.png",), (("human", "What is the sum?"),))
    with pytest.raises(ConfigError, match=r"'odd' has 0 <image>"):
        answers(student, ([odd], asked[1]))


def test_questions_of_the_corpus_are_llava_json(asked):
    assert json.loads(asked[0][0].to_json())["question_type"] in scenes.QUESTION_TYPES
