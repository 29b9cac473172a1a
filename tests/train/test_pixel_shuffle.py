"""Tests of training with the projector pixel_shuffle: fewer tokens to read, the same KD."""

import pytest
import torch

from movekd.errors import ConfigError
from movekd.student.checkpoint import load_student, part_of
from movekd.student.vlm import build_vlm
from movekd.train.init_from import check_same_base

SHUFFLED = "student.projector_type=pixel_shuffle"
SAVING = ("training.save_strategy=steps", "training.save_steps=1", "training.max_steps=2")


@pytest.fixture(scope="module")
def first(digits, tmp_path_factory):
    """A finished stage 1 of two steps."""
    output = tmp_path_factory.mktemp("first") / "run"
    digits.train(output, "pretrain", SHUFFLED, *SAVING)
    return output


def test_samples_hold_the_tokens_of_the_projector_and_kd_those_of_the_tower(digits):
    keys = ("recipe=official", "distill.grid=student", SHUFFLED)
    model, student, dataset, collator = digits.parts(digits.config("pretrain", *keys))
    image_id = dataset.tokenizer.convert_tokens_to_ids("<image>")
    assert dataset.num_image_tokens(0) == dataset[0].input_ids.count(image_id) == 9
    assert {adapter.tokens.out_features for adapter in model.adapters.values()} == {36}
    batch = collator([dataset[0], dataset[1]])
    batch.pop("keys")
    terms = digits.terms(model, batch)
    (terms["text"] + terms["kd"]).backward()
    assert all(p.grad.any() for p in student.vlm.model.multi_modal_projector.parameters())
    assert terms["kd"].isfinite()


def test_experts_projector_tower_and_heads_learn_in_pretrain(digits, first):
    kept = dict(build_vlm(digits.config("pretrain", SHUFFLED).student).vlm.named_parameters())
    student = load_student(first).student
    assert student.num_image_tokens == 9
    changed = {part_of(n) for n, p in student.vlm.named_parameters() if not torch.equal(p, kept[n])}
    assert changed == {"mole", "projector", "vision_tower"}


def test_a_resumed_run_ends_as_an_uninterrupted_one(digits, tmp_path, first):
    def stop(what, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path, "pretrain", SHUFFLED, *SAVING, progress=stop)
    digits.train(tmp_path, "pretrain", SHUFFLED, *SAVING, resume=True)
    one, two = digits.weights(first), digits.weights(tmp_path)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_next_stage_starts_from_it_and_the_other_projector_is_refused(digits, tmp_path, first):
    begin = (f"init_from={first}", "training.max_steps=1", "training.learning_rate=0")
    digits.train(tmp_path / "next", "finetune", SHUFFLED, *begin)
    one, two = digits.weights(first), digits.weights(tmp_path / "next")
    assert all(torch.equal(one[name], two[name]) for name in one)
    said = r"student\.projector_type 'pixel_shuffle', and this run has 'mlp2x_gelu'.*Set student\."
    with pytest.raises(ConfigError, match=said):
        digits.train(tmp_path / "other", "finetune", *begin)


def test_a_run_without_the_key_had_llavas_projector_or_none(digits, tmp_path, first):
    config = digits.config("finetune", SHUFFLED, f"init_from={tmp_path}")
    lines = (first / "model/config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "projector_type" not in line]
    assert len(kept) == len(lines) - 1
    (tmp_path / "config.yaml").write_text("".join(kept))
    check_same_base(config, tmp_path)  # an encoder: nothing to differ in
    (tmp_path / "mm_projector.safetensors").touch()
    with pytest.raises(ConfigError, match=r"student\.projector_type 'mlp2x_gelu', and this run"):
        check_same_base(config, tmp_path)
