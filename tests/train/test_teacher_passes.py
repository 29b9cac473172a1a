"""Tests of movekd.train.teacher_passes: experts per teacher in training.

Legend: I images, N tokens, D channels.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from exports import export
from movekd.distill.objective import count_units, step_loss
from movekd.errors import ConfigError
from movekd.student import restricted, routing
from movekd.student.checkpoint import load_student
from movekd.student.export.load_again import load_onnx
from movekd.student.hidden_state import tower_hidden_state
from movekd.student.vlm import image_features

PER_TEACHER = "student.mole.experts=per_teacher"
NO_DROPOUT = "student.mole.lora_dropout=0"
ONLY_CLIP = ("distill.teacher_weighting=anchor_equal", "distill.anchor_share=1")
CLIP, SAM = 0, 1  # their experts


@pytest.fixture
def batch_of(digits):
    """Return a model whose experts all differ from zero, in training mode, and a batch."""

    def batch_of(stage, *overrides, samples=range(4)):
        config = digits.config(stage, PER_TEACHER, NO_DROPOUT, *overrides)
        model, _, dataset, collator = digits.parts(config)
        for name, parameter in model.vlm.named_parameters():
            if ".mole_" in name:
                scale = 0.5 if "router" in name else 0.05
                parameter.data.add_(scale * torch.randn_like(parameter))
        batch = collator([dataset[position] for position in samples])
        batch.pop("keys")
        return model.train(), batch

    return batch_of


def kd_by_hand(model, tokens_IND, batch, teacher):
    """The KD loss of one teacher with `token_weighting: none`, a mean over images."""
    output = model.compare(tokens_IND, batch["targets"])
    at = list(batch["targets"]).index(teacher)
    return F.mse_loss(output.predictions[at], output.goals[at])


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_the_loss_is_the_share_of_both_kinds_of_passes(digits, batch_of, stage):
    keys = ("distill.token_weighting=none", "student.mole.free_kd_share=0.25")
    model, batch = batch_of(stage, *keys)
    terms = digits.terms(model, batch)
    _, free_IND = image_features(model.vlm, batch["pixel_values"])
    total = free = 0.0
    for expert, teacher in enumerate(("clip", "sam")):
        with restricted(model.vlm, teacher):
            own_IND = tower_hidden_state(model.vlm, batch["pixel_values"])[:, 1:]
            shares = [choice[..., expert].mean() for _, choice in routing(model.vlm)]
        of_free = kd_by_hand(model, free_IND, batch, teacher)
        of_own = kd_by_hand(model, own_IND, batch, teacher)
        assert (of_free - of_own).abs() > 1e-4
        expected = 0.25 * of_free + 0.75 * of_own
        torch.testing.assert_close(terms[f"kd_{teacher}"] / 4, expected.detach())
        share = terms[f"own_expert_share_{teacher}"]
        torch.testing.assert_close(share, torch.stack(shares).mean())
        assert 0 < share < 1
        total, free = total + expected / 2, free + of_free / 2
    torch.testing.assert_close(terms["kd"] / 4, total)
    torch.testing.assert_close(terms["free_kd"] / 4, free.detach())


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_teacher_moves_the_expert_of_another_only_by_the_free_pass(batch_of, share):
    """The KD loss is that of clip."""
    model, batch = batch_of("pretrain", f"student.mole.free_kd_share={share}", *ONLY_CLIP)
    term = next(term for term in model(**batch) if term.name == "kd")
    term.sum.backward()
    experts = {n: p.grad for n, p in model.vlm.named_parameters() if ".mole_" in n}
    for name, gradient in experts.items():
        assert gradient[CLIP].ne(0).any(), name
        assert gradient[-1].ne(0).any(), name  # a shared one
    assert any(bool(g[SAM].ne(0).any()) for g in experts.values()) == (share > 0)


def test_the_balance_loss_and_the_text_are_of_the_free_pass(digits, batch_of):
    model, batch = batch_of("pretrain")
    terms = digits.terms(model, batch)
    kept = [choice.clone() for _, choice in routing(model.vlm)]
    image_features(model.vlm, batch["pixel_values"])
    for (_, free), found in zip(routing(model.vlm), kept, strict=True):
        assert torch.equal(free, found)
        assert free.shape[-1] == 5  # two of teachers, three shared
    model.objective = type(model.objective)(
        model.objective.distill, "batch", model.objective.balance_weight
    )
    shared = digits.terms(model, batch)  # the same weights, without further passes
    for name in ("text", "balance", "routing_share", "token_std"):
        assert torch.equal(shared[name], terms[name]), name
    torch.testing.assert_close(shared["kd"], terms["free_kd"])
    assert "free_kd" not in shared


@pytest.mark.parametrize(
    ("keys", "times"),
    [
        ((), 1),
        ((PER_TEACHER,), 3),
        ((PER_TEACHER, "student.mole.free_kd_share=1"), 1),
        ((PER_TEACHER, "distill=null", "student.mole.teachers=[clip, sam]"), 1),
    ],
)
@pytest.mark.parametrize("has_images", [True, False])
def test_the_tower_runs_once_and_once_more_per_teacher(digits, keys, times, has_images):
    model, _, dataset, collator = digits.parts(digits.config("finetune", *keys))
    batch = collator([dataset[at] for at in ((0, 1) if has_images else (11, 12))])
    batch.pop("keys")
    assert (batch["pixel_values"] is not None) == has_images
    seen = []
    model.vlm.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    terms = model.train()(**batch)
    assert len(seen) == times
    step_loss(terms, count_units(batch), 1)[0].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    plain, _, _, _ = digits.parts(digits.config("finetune"))
    step_loss(plain.train()(**batch), count_units(batch), 1)[0].backward()
    unused = [n for n, p in plain.named_parameters() if p.requires_grad and p.grad is None]
    assert keys[1:2] == ("distill=null",) or missing == unused


def test_checkpointing_and_a_resume_change_nothing(digits, tmp_path):
    keys = (PER_TEACHER, "training.max_steps=3", "student.mole.lora_dropout=0.3")
    keys += ("training.save_strategy=steps", "training.save_steps=1")
    whole = digits.train(tmp_path / "whole", "distill", *keys)
    again = "training.gradient_checkpointing=true"
    recomputed = digits.train(tmp_path / "recomputed", "distill", *keys, again)
    for one, two in zip(digits.logged(whole), digits.logged(recomputed), strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert one["loss_free_kd"] != one["loss_kd"]

    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "distill", *keys, progress=stop)
    digits.train(tmp_path / "parts", "distill", *keys, resume=True)
    expected, found = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_held_out_losses_are_those_of_training_and_of_the_model_that_ships(digits, tmp_path):
    keys = ("training.max_steps=1", "data.val_size=5", "training.eval_steps=1", PER_TEACHER)
    keys += ("training.eval_on_start=true",)
    logs = {
        share: digits.train(
            tmp_path / str(share), "pretrain", *keys, f"student.mole.free_kd_share={share}"
        ).log
        for share in (0.5, 1)
    }
    both, free = (next(e for e in logs[share] if "eval_loss" in e) for share in (0.5, 1))
    assert both["eval_loss_free_kd"] == pytest.approx(free["eval_loss_kd"], rel=1e-5)
    expected = both["eval_loss_text"] + 2 * both["eval_loss_kd"]
    assert both["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # those of the ONNX exporter's own packages
def test_the_export_computes_the_free_pass(digits, tmp_path, batch_of):
    digits.train(tmp_path / "run", "distill", PER_TEACHER, "training.max_steps=2")
    trained = load_student(tmp_path / "run", takes_encoder=True)
    _, batch = batch_of("distill")
    with torch.no_grad():
        _, expected_IND = image_features(trained.student.vlm, batch["pixel_values"])
        for kind in ("encoder", "onnx"):
            export(trained, kind, tmp_path / kind)
        given = {"pixel_values": batch["pixel_values"]}
        found, _ = load_onnx({"directory": str(tmp_path / "onnx")}, given)
        torch.testing.assert_close(found["tokens"], expected_IND, rtol=1e-4, atol=1e-4)
        model = AutoModel.from_pretrained(tmp_path / "encoder", trust_remote_code=True).eval()
        assert model.config.num_experts == 5
        found = model(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(found, expected_IND, rtol=1e-5, atol=1e-5)
        with restricted(trained.student.vlm, "sam"):
            _, other_IND = image_features(trained.student.vlm, batch["pixel_values"])
    assert (other_IND - expected_IND).abs().max() > 1e-4


def test_a_later_stage_has_the_experts_of_the_same_teachers(digits, tmp_path):
    first = tmp_path / "first"
    digits.train(first, "distill", PER_TEACHER, "training.max_steps=1")
    begin = (f"init_from={first}", "training.max_steps=1", "training.learning_rate=0")
    teachers = "student.mole.teachers=[clip, sam]"
    cases = {
        "plain": ("distill=null", teachers),
        "other order": ("distill.teachers=[sam, clip]", teachers),
        "same": (),
    }
    expected = digits.weights(first)
    for name, keys in cases.items():
        digits.train(tmp_path / name, "pretrain", PER_TEACHER, *begin, *keys)
        found = digits.weights(tmp_path / name)
        of_experts = [n for n in expected if n.startswith("mole")]
        assert len(of_experts) > 40
        assert all(torch.equal(found[n], expected[n]) for n in of_experts), name
    for keys, said in (
        ((), r"student\.mole\.experts 'per_teacher', and this run has 'shared'"),
        (
            (PER_TEACHER, "distill.teachers=[clip]"),
            r"mole\.teachers '\['clip', 'sam'\]'.*\['clip'\]",
        ),
        ((PER_TEACHER, "student.mole.teachers=[sam, clip]"), r"Set student\.mole\.teachers: \['c"),
    ):
        with pytest.raises(ConfigError, match=said):
            digits.train(tmp_path / "refused", "pretrain", *begin, *keys)
    shared = tmp_path / "shared"
    digits.train(shared, "distill", "training.max_steps=1")
    with pytest.raises(ConfigError, match=r"experts 'shared', and this run has 'per_teacher'"):
        digits.train(tmp_path / "refused", "pretrain", PER_TEACHER, f"init_from={shared}")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("recipe=official",), r"recipe: official is the released method"),
        (("distill=null", "stage=pretrain"), r"distill is null.*Set student\.mole\.teachers to"),
        (
            ("student.mole.teachers=[clip]",),
            r"distill\.teachers is clip, sam, and student.*is clip; expected",
        ),
        (("student.mole.free_kd_share=0",), r"free_kd_share is 0, and stage: distill has no text"),
        (("student.mole.teachers=[clip, clip]",), r"a teacher is named twice"),
    ],
)
def test_experts_that_cannot_learn_are_refused(digits, keys, said):
    with pytest.raises(ConfigError, match=said):
        digits.config("distill", PER_TEACHER, *keys)


def test_teachers_of_shared_experts_are_refused(digits):
    with pytest.raises(ConfigError, match=r"names experts of teachers, and experts is shared"):
        digits.config("distill", "student.mole.teachers=[clip, sam]")


def test_shared_experts_are_what_they_were(digits, tmp_path):
    """Against numbers of the version before experts per teacher."""
    config = digits.config("distill", "recipe=revised_2026_11")
    assert config.student.mole.experts == "shared"
    assert config.student.mole.teachers is None
    model, _, _, _ = digits.parts(config)
    parameters = dict(model.named_parameters())
    block = "vlm.model.vision_tower.encoder.layers.0.mlp."
    for name, shape, total in (  # in the order in which they draw
        (f"{block}mole_fc1.default.lora_A", (3, 16, 96), -10.999662101268768),
        (f"{block}mole_router.default.weight", (3, 96), -0.8529593021376058),
        ("adapters.sam.output.weight", (48, 96), -2.047404900104084),
    ):
        assert parameters[name].shape == shape
        assert parameters[name].double().sum().item() == pytest.approx(total, rel=1e-6)
    keys = ("training.max_steps=3", "student.mole.lora_dropout=0.3", "recipe=revised_2026_11")
    steps = digits.logged(digits.train(tmp_path / "run", "distill", *keys))
    figures = ("loss", "loss_kd", "loss_kd_sam", "loss_balance", "grad_norm")
    before = (
        (1.7138978242874146, 0.851356565952301, 0.6113168597221375, 1.1184720993041992, 0.402747),
        (1.6432613134384155, 0.815977156162262, 0.6389074325561523, 1.1306977272033691, 0.398544),
        (1.6504284143447876, 0.8195387125015259, 0.5751461982727051, 1.1350934505462646, 0.39778),
    )
    for step, expected in zip(steps, before, strict=True):
        assert [step[name] for name in figures] == pytest.approx(expected, rel=1e-4)
        assert not any("free_kd" in name or "own_expert" in name for name in step)
