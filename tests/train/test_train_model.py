"""Tests of movekd.train.model: the loss terms against equations written out.

Legend: I images, N tokens, D channels, M teacher tokens.
"""

import pytest
import torch
from torch.nn import functional as F

from movekd.cache import open_cache
from movekd.cache.codecs import codec
from movekd.cache.grid import resize_attention, resize_tokens
from movekd.cache.stats import ChannelStats
from movekd.cache.targets import TeacherTargets
from movekd.distill import released_sam_tokens, teacher_weights, token_weights
from movekd.distill.loss_terms import count_answer_tokens
from movekd.distill.objective import Objective, count_units, step_loss
from movekd.errors import ConfigError
from movekd.student import TeacherAdapter, routing
from movekd.student.vlm import image_features
from movekd.train.model import DistillModel, TargetShape, check_targets

REVISED = ()
OFFICIAL = ("recipe=official",)


@pytest.fixture
def batch_of(digits):
    """Return (config, model in evaluation mode, batch) of a stage and some samples."""

    def batch_of(stage="pretrain", overrides=(), samples=range(4)):
        config = digits.config(stage, *overrides)
        model, _, dataset, collator = digits.parts(config)
        batch = collator([dataset[position] for position in samples])
        batch.pop("keys")
        return config, model.eval(), batch

    return batch_of


def text_by_hand(model, batch):
    """Sum of -log p over the answer tokens, with transformers' own way in for the images."""
    logits = model.vlm(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"],
    ).logits
    total, count = 0.0, 0
    for sample, labels in enumerate(batch["labels"]):
        for position in range(1, len(labels)):
            if labels[position] != -100:
                log_p = logits[sample, position - 1].float().log_softmax(0)
                total, count = total - log_p[labels[position]], count + 1
    return total, count


def test_text_is_summed_over_answer_tokens(digits, batch_of):
    _, model, batch = batch_of()
    expected, count = text_by_hand(model, batch)
    terms = digits.terms(model, batch)
    assert int(count_answer_tokens(batch["labels"])) == count
    torch.testing.assert_close(terms["text"], expected, rtol=1e-5, atol=1e-4)


def test_revised_kd_is_the_equation(digits, batch_of):
    config, model, batch = batch_of(overrides=REVISED)
    _, student_IND = image_features(model.vlm, batch["pixel_values"])
    attention_IN = batch["targets"]["clip"].cls_attention_BHN.mean(1)
    total = 0.0
    for image in range(4):
        a = attention_IN[image]
        w = 0.5 + 0.5 * (a / a.sum() * len(a)).clamp(max=4)
        w = w / w.mean()
        for teacher in ("clip", "sam"):
            target = batch["targets"][teacher]
            z = (target.tokens_BND - target.stats.mean_D) / target.stats.std_D
            z_ND = resize_tokens(z[image : image + 1], 6)[0]
            head = model.adapters[teacher]
            hidden_ND = F.layer_norm(
                student_IND[image], (96,), head.norm.weight, head.norm.bias, head.norm.eps
            )
            hidden_ND = F.gelu(hidden_ND @ head.hidden.weight.T + head.hidden.bias)
            guess_ND = hidden_ND @ head.output.weight.T + head.output.bias
            total += (w * (guess_ND - z_ND).square().mean(1)).mean() / 2
    terms = digits.terms(model, batch)
    torch.testing.assert_close(terms["kd"], total, rtol=1e-4, atol=1e-5)
    assert config.distill.kd_weight == 2


def test_official_kd_is_the_equation(digits, batch_of):
    config, model, batch = batch_of(overrides=OFFICIAL)
    _, student_IND = image_features(model.vlm, batch["pixel_values"])
    clip, sam = batch["targets"]["clip"], batch["targets"]["sam"]
    assert sam.tokens_BND.shape[1] == 144  # the native grid
    adapter = model.adapters["sam"]
    assert list(model.adapters) == ["sam"]  # the anchor needs none
    total = 0.0
    for image in range(4):
        w = torch.softmax(clip.cls_attention_BHN[image].mean(0), 0)
        hidden_MD = F.gelu(
            sam.tokens_BND[image] @ adapter.channels.weight.T + adapter.channels.bias
        )
        adapted_ND = (hidden_MD.T @ adapter.tokens.weight.T + adapter.tokens.bias).T
        for share, goal_ND in ((0.8, clip.tokens_BND[image]), (0.2, adapted_ND)):
            error_N = (student_IND[image] - goal_ND).square().mean(1)
            total += share * (error_N.mean() + (w * error_N).sum())
    terms = digits.terms(model, batch)
    torch.testing.assert_close(terms["kd"], total, rtol=1e-4, atol=1e-4)
    assert config.distill.kd_weight == 0.5


def test_the_released_layout_of_sam_is_what_its_adapter_is_given(digits, batch_of):
    """Of a map of 4 x 4 with 16 channels."""
    config, _, batch = batch_of(overrides=OFFICIAL)
    distill = config.distill.model_copy(update={"sam_layout": "released"})
    _, student, _, _ = digits.parts(config)
    shapes = {"clip": TargetShape(36, 96), "sam": TargetShape(16, 16)}
    model = DistillModel(student, Objective(distill, "sample"), shapes).eval()
    stats = ChannelStats(torch.zeros(16), torch.ones(16))
    plain_IMD, plain_codec = torch.randn(4, 16, 16), codec("float16")
    plain = batch["targets"] | {"sam": TeacherTargets({"tokens": plain_IMD}, stats, plain_codec)}
    ordered_IMD = released_sam_tokens(plain_IMD)
    ordered = batch["targets"] | {
        "sam": TeacherTargets({"tokens": ordered_IMD}, stats, plain_codec)
    }
    student_IND = torch.randn(4, 36, 96)
    found = digits.kd(model, student_IND, plain)["kd_sam"]
    model.objective = Objective(config.distill, "sample")
    torch.testing.assert_close(found, digits.kd(model, student_IND, ordered)["kd_sam"])
    assert found != digits.kd(model, student_IND, plain)["kd_sam"]


def test_the_released_layout_is_for_the_official_adapters(digits):
    with pytest.raises(ConfigError, match=r"sam_layout: released is for adapters: teacher"):
        digits.config("pretrain", "distill.sam_layout=released")


def test_balance_of_both_recipes_is_the_equation(digits, batch_of):
    for overrides, layers in ((REVISED, 5), (OFFICIAL, 6)):
        _, model, batch = batch_of(overrides=overrides)
        balance = digits.terms(model, batch)["balance"] / len(batch["pixel_values"])
        records = routing(model.vlm)
        assert len(records) == layers
        p_LIE = torch.stack([p.mean(1) for p, _ in records])
        f_LIE = torch.stack([f.mean(1) for _, f in records])
        if overrides == OFFICIAL:
            expected = (p_LIE.mean(0) * f_LIE.mean(0)).sum(1).mean()
        else:
            expected = 3 * (p_LIE.mean(1) * f_LIE.mean(1)).sum(1).mean()
        torch.testing.assert_close(balance, expected)


def test_images_without_a_sample_of_their_own_count_too(digits, batch_of):
    # finetune's entry 10 has two images, and 11 to 15 have none
    _, model, batch = batch_of("finetune", samples=[0, 10, 11])
    assert len(batch["pixel_values"]) == 3
    terms = digits.terms(model, batch)
    assert count_units(batch)[1] == 3
    alone = [batch_of("finetune", samples=[position])[2] for position in (0, 10)]
    apart = sum(digits.terms(model, one)["kd"] for one in alone)
    torch.testing.assert_close(terms["kd"], apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overrides", [REVISED, OFFICIAL])
def test_text_only_batches_give_zero_gradients_not_none(digits, batch_of, overrides):
    _, model, batch = batch_of(
        "finetune", [*overrides, "student.mole.layers_to_transform=read"], samples=[11, 12]
    )
    assert batch["pixel_values"] is None
    assert batch["targets"] is None
    terms = digits.terms(model, batch)
    assert terms["kd"] == 0
    (terms["text"] + terms["kd"]).backward()
    read = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if "vision_tower" in name or "projector" in name or "adapters" in name
        if "layers.5." not in name and "post_layernorm" not in name and "router" not in name
    ]
    for name, parameter in read:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert model.vlm.lm_head.weight.grad.any()


LORA = "student.language_model_lora={r: 4, lora_alpha: 8, lora_dropout: 0}"


@pytest.mark.parametrize(
    "overrides",
    [
        ("trained=[mole, projector]",),
        (LORA, "trained=[mole, projector, language_model]"),
        (LORA, "trained=[language_model]"),
        (),
    ],
)
def test_backward_passes_the_same_blocks_in_the_same_order_without_an_image(
    digits, batch_of, overrides
):
    """FSDP2 gathers a block before its backward, and lets go after that of its input.

    Ranks that do so in different orders wait for each other for ever.
    """
    passed = []
    for samples in ([0, 1], [11, 12]):
        _, model, batch = batch_of("finetune", ["distill.summary_weight=0.5", *overrides], samples)
        found, vlm = [], model.vlm.model
        for name, layers in (
            ("language", vlm.language_model.layers),
            ("tower", vlm.vision_tower.encoder.layers),
        ):
            for number, layer in enumerate(layers):
                block = (name, number)

                def enter(module, inputs, block=block, found=found):
                    found.append(("forward", block, inputs[0].requires_grad))

                def leave(module, gradients, block=block, found=found):
                    found.append(("backward", block))

                layer.register_forward_pre_hook(enter)
                layer.register_full_backward_pre_hook(leave)
        step_loss(model(**batch), count_units(batch), 1)[0].backward()
        passed.append(found)
    assert passed[0] == passed[1]
    assert any(kind == "backward" for kind, *_ in passed[0])


def test_revised_experts_end_where_the_student_is_read(digits, batch_of):
    _, model, batch = batch_of()
    layers = {
        int(name.split("layers.")[1].split(".")[0])
        for name, _ in model.named_parameters()
        if ".mole_" in name
    }
    assert layers == set(range(5))  # hidden state -2 of 6 blocks
    terms = digits.terms(model, batch)
    terms["kd"].backward()
    assert all(term.isfinite().all() for term in terms.values())
    for name, parameter in model.vlm.named_parameters():
        if ".mole_" in name and "lora_B" in name:
            assert parameter.grad.any(), f"{name} does not learn from the teachers"


def test_official_adapters_mix_a_native_grid(digits):
    config = digits.config("pretrain", *OFFICIAL)
    model, *_ = digits.parts(config)
    assert isinstance(model.adapters["sam"], TeacherAdapter)
    assert model.adapters["sam"].tokens.weight.shape == (36, 144)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("distill.anchor=sam",), r"needs the \[CLS\] attention of the anchor, which 'sam'"),
        (
            (*OFFICIAL, "distill.anchor=sam", "distill.token_weighting=none"),
            r"'anchor' needs the \[CLS\] embedding of 'sam'",
        ),
        (
            (
                *OFFICIAL,
                "distill.anchor=sam",
                "distill.token_weighting=none",
                "distill.teacher_weighting=anchor_equal",
            ),
            r"'sam' .*has 144 tokens of \d+ channels and the student 36 of 96",
        ),
        (
            (
                *OFFICIAL,
                "distill.anchor=sam",
                "distill.token_weighting=none",
                "distill.teacher_weighting=equal",
                "distill.adapters=teacher",
                "distill.teachers=[clip]",
                "distill.anchor=other",
            ),
            r"distill\.grid is 'native', but 'clip' .*was pooled .*grid: 6.*--grid native",
        ),
    ],
)
def test_targets_that_do_not_fit_are_refused(digits, overrides, message):
    config = digits.config("pretrain", *overrides)
    student = digits.parts(digits.config("pretrain", "distill=null"))[1]
    with pytest.raises(ConfigError, match=message):
        check_targets(open_cache(digits.cache), config.distill, student)


@pytest.mark.parametrize("weighting", ["anchor", "anchor_equal"])
def test_the_anchor_has_the_share_that_the_config_gives_it(digits, batch_of, weighting):
    keys = ("recipe=official", f"distill.teacher_weighting={weighting}")
    for override, share in (((), 0.8), (("distill.anchor_share=0.3",), 0.3)):
        _, model, batch = batch_of(overrides=(*keys, *override))
        terms = digits.terms(model, batch)
        assert terms["teacher_weight_clip"] == pytest.approx(share)
        assert terms["teacher_weight_sam"] == pytest.approx(1 - share)
        parts = share * terms["kd_clip"] + (1 - share) * terms["kd_sam"]
        torch.testing.assert_close(terms["kd"].detach(), parts)


def test_balanced_teachers_are_weighed_by_their_losses(digits, batch_of):
    _, model, batch = batch_of(overrides=("distill.teacher_weighting=balanced",))
    terms = digits.terms(model, batch)
    losses = torch.stack([terms["kd_clip"], terms["kd_sam"]]) / 4
    weights = (1 / losses) / (1 / losses).sum()
    torch.testing.assert_close(terms["kd"].detach(), 4 * (weights * losses).sum())
    torch.testing.assert_close(terms["teacher_weight_sam"], weights[1])


def test_similar_teachers_weigh_more_and_each_by_its_sample(digits, batch_of):
    _, model, batch = batch_of(overrides=("distill.teacher_weighting=similarity",))
    terms = digits.terms(model, batch)
    assert terms["teacher_weight_clip"] > 0.5 > terms["teacher_weight_sam"] > 0
    targets = [resize_tokens(batch["targets"][t].standardised_BND, 6) for t in ("clip", "sam")]
    expected = teacher_weights(targets, "similarity").mean(0)
    torch.testing.assert_close(terms["teacher_weight_sam"], expected[1])


def test_scaled_targets_are_the_caches(digits, batch_of):
    _, model, batch = batch_of(overrides=("distill.targets=scaled",))
    with torch.no_grad():
        for head in model.adapters.values():
            head.output.weight.zero_()
            head.output.bias.zero_()
    found = digits.terms(model, batch)["kd"]
    scaled = [resize_tokens(batch["targets"][t].scaled_BND, 6) for t in ("clip", "sam")]
    attention_IHN = resize_attention(batch["targets"]["clip"].cls_attention_BHN, 6)
    weights_IN = token_weights(attention_IHN, "blend")
    expected = sum((weights_IN * z.square().mean(2)).mean(1).sum() / 2 for z in scaled)
    torch.testing.assert_close(found, expected)


def test_attention_is_brought_to_the_students_grid():
    attention_BHN = torch.rand(2, 3, 144).softmax(2)
    assert resize_attention(attention_BHN, 6).shape == (2, 3, 36)
