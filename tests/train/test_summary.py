"""Runs with `distill.summary_weight`: off changes nothing, on is torch's cosine on [CLS]."""

import pytest
import torch
from torch.nn import functional as F

from movekd.distill.summary import summary_terms
from movekd.errors import ConfigError
from movekd.student.checkpoint import load_student

ON = ("distill.summary_weight=0.5",)
HEADS = {"summary/clip", "summary/sam"}


def heads(weights):
    """Return the names of the heads among a run's tensors."""
    return {n.split("/", 1)[1].split(".")[0] for n in weights if n.startswith("encoder_adapter")}


def batch_of(digits, *overrides, stage="pretrain"):
    model, _, dataset, collator = digits.parts(digits.config(stage, *overrides))
    batch = collator([dataset[position] for position in range(4)])
    batch.pop("keys")
    return model.eval(), batch


@pytest.mark.parametrize("stage", ["distill", "pretrain"])
def test_the_loss_is_torchs_cosine_of_cls_and_of_the_mean_token(digits, stage):
    model, batch = batch_of(digits, *ON, stage=stage)
    clip, sam = batch["targets"]["clip"], batch["targets"]["sam"]
    assert sam.cls_BD is None
    goals = {"clip": clip.cls_BD, "sam": sam.standardised_BND.mean(1)}
    tower = model.vlm.model["vision_tower"] if stage == "distill" else model.vlm.model.vision_tower
    hidden = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
    terms = digits.terms(model, batch)
    for name, goal in goals.items():
        found = model.adapters[f"summary/{name}"](hidden[:, 0])
        expected = F.cosine_embedding_loss(found, goal, torch.ones(4))
        torch.testing.assert_close(terms[f"summary_{name}"] / 4, expected, rtol=1e-5, atol=1e-6)
    mean = (terms["summary_clip"] + terms["summary_sam"]) / 2
    torch.testing.assert_close(terms["summary"].detach(), mean)


def test_gradients_reach_cls_and_its_heads_and_no_other_head(digits):
    model, batch = batch_of(digits, *ON, "student.mole=null", "trained=[vision_tower]")
    digits.terms(model, batch)["summary"].backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[1] for n in grads if n.startswith("adapters.")} == HEADS
    assert any("class_embedding" in name for name in grads)
    assert any("layers.4.mlp" in name for name in grads)
    assert not any("language_model" in n or "projector" in n for n in grads)


def test_off_is_bit_for_bit_as_without_the_key_and_on_leaves_the_first_step_alone(digits, tmp_path):
    keys = ("training.max_steps=2", "training.logging_steps=1")
    off = digits.train(tmp_path / "off", "distill", "distill.summary_weight=0", *keys)
    on = digits.train(tmp_path / "on", "distill", *ON, *keys)
    assert heads(digits.weights(tmp_path / "off")) == {"clip", "sam"}
    assert heads(digits.weights(tmp_path / "on")) == {"clip", "sam"} | HEADS
    first_off, first_on = digits.logged(off)[0], digits.logged(on)[0]
    assert not any("summary" in name for name in first_off)
    assert first_on["loss_kd"] == first_off["loss_kd"]  # the same random numbers
    parts = (2, "kd"), (0.01, "balance"), (0.5, "summary")
    expected = sum(weight * first_on[f"loss_{name}"] for weight, name in parts)
    assert first_on["loss"] == pytest.approx(expected, abs=1e-4)
    assert {"loss_summary_clip", "loss_summary_sam"} <= first_on.keys()


def test_interrupted_and_resumed_equals_uninterrupted(digits, tmp_path):
    def stop(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    keys = (*ON, "training.save_strategy=steps", "training.save_steps=2")
    keys += ("learning_rates={heads: 1.0e-3}", "training.max_steps=4")
    whole = digits.train(tmp_path / "whole", "distill", *keys)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "part", "distill", *keys, progress=stop)
    part = digits.train(tmp_path / "part", "distill", *keys, resume=True)
    assert digits.logged(part) == digits.logged(whole)
    one, two = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "part")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_later_stage_takes_the_heads_and_a_model_for_use_has_none(digits, tmp_path):
    still = ("training.max_steps=1", "training.learning_rate=0")
    digits.train(tmp_path / "on", "distill", *ON, "training.max_steps=1")
    first = digits.weights(tmp_path / "on")
    student = load_student(tmp_path / "on", takes_encoder=True).student
    assert not any("summary" in name for name, _ in student.vlm.named_parameters())
    begin = f"init_from={tmp_path / 'on'}"
    digits.train(tmp_path / "later", "pretrain", begin, *ON, *still)
    later = digits.weights(tmp_path / "later")
    assert all(torch.equal(first[name], later[name]) for name in first)
    digits.train(tmp_path / "off", "pretrain", begin, *still)  # the heads may end here ...
    off = digits.weights(tmp_path / "off")
    assert heads(off) == {"clip", "sam"}
    begin = f"init_from={tmp_path / 'off'}"
    digits.train(tmp_path / "again", "distill", begin, *ON, *still)  # ... or begin here
    again = digits.weights(tmp_path / "again")
    assert heads(again) == {"clip", "sam"} | HEADS
    shared = [name for name in first if "summary/" not in name]
    assert all(torch.equal(first[name], again[name]) for name in shared)


def test_text_only_batches_and_the_official_recipe_have_it_too(digits, tmp_path):
    keys = (*ON, "recipe=official", "training.max_steps=4")
    keys += ("training.per_device_train_batch_size=1", "data.group_by_modality_length=false")
    logged = digits.logged(digits.train(tmp_path, "finetune", *keys))
    assert heads(digits.weights(tmp_path)) == {"sam"} | HEADS
    found = [entry["loss_summary"] for entry in logged]
    assert all(value >= 0 for value in found)
    assert any(value > 0 for value in found)


def test_a_tower_without_cls_uses_its_mean_patch(digits):
    from movekd.student.hidden_state import global_token
    from movekd.student.towers import TOWERS

    class Config:
        num_register_tokens = 0
        model_type = "siglip_vision_model"

    assert TOWERS["siglip_vision_model"].num_special == 0
    hidden = torch.randn(2, 5, 3)
    assert torch.equal(global_token(hidden, Config), hidden.mean(1))
    Config.model_type, Config.num_register_tokens = "dinov2_with_registers", 4
    assert torch.equal(global_token(hidden, Config), hidden[:, 0])


def test_a_term_of_the_same_name_is_refused(digits, monkeypatch):
    from movekd.distill import register_loss_term
    from movekd.distill.loss_terms import LOSS_TERMS

    monkeypatch.setattr("movekd.distill.loss_terms.LOSS_TERMS", dict(LOSS_TERMS))
    register_loss_term("summary", lambda output, keys: output.student_IND.sum())
    term = "loss_terms={summary: {weight: 0.1}}"
    assert digits.config("pretrain", term).loss_terms
    with pytest.raises(ConfigError, match=r"loss_terms names 'summary', and distill\.summary_wei"):
        digits.config("pretrain", term, *ON)


def test_without_targets_the_terms_have_the_same_names(digits):
    model, batch = batch_of(digits, *ON)
    distill = model.objective.distill
    output = model.compare(torch.randn(4, 36, 96), batch["targets"], torch.randn(4, 96))
    empty = output._replace(targets=None, summary_predictions=(), summary_goals=())
    names = [[term.name for term in summary_terms(distill, each)] for each in (output, empty)]
    assert names[0] == names[1] == ["summary", "summary_clip", "summary_sam"]
