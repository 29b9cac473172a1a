"""Runs with `distill.loss` and `distill.target_clip`: defaults, refusals, what is compared."""

import pytest
import torch

from movekd.cache.grid import resize_tokens
from movekd.errors import ConfigError
from movekd.train.recipes import RECIPES
from movekd.train.run_dir import plan_start, write_run_files

ROBUST = ("distill.loss=cosine+smooth_l1", "distill.target_clip=1.5")


def batch_of(digits, *overrides):
    """Return a model in evaluation mode, and a batch of four images with targets."""
    model, _, dataset, collator = digits.parts(digits.config("distill", *overrides))
    batch = collator([dataset[position] for position in range(4)])
    batch.pop("keys")
    return model.eval(), batch


@pytest.mark.parametrize("recipe", ["official", "revised"])
def test_without_the_keys_the_loss_is_squared_and_nothing_is_limited(digits, recipe):
    distill = digits.config("pretrain", f"recipe={recipe}").distill
    assert (distill.loss, distill.target_clip) == ("mse", 0)


def test_the_limit_holds_for_what_is_compared(digits):
    plain, batch = batch_of(digits)
    limited, _ = batch_of(digits, *ROBUST)
    tokens_IND = torch.randn(4, 36, 96, generator=torch.Generator().manual_seed(0))
    goals = [model.compare(tokens_IND, batch["targets"]).goals for model in (plain, limited)]
    for name, before_IND, after_IND in zip(("clip", "sam"), *goals, strict=True):
        expected_IND = resize_tokens(batch["targets"][name].standardised_BND, 6)
        assert torch.equal(before_IND, expected_IND)
        assert before_IND.abs().max() > 1.5
        assert torch.equal(after_IND, expected_IND.clamp(-1.5, 1.5))


def test_every_form_trains_and_all_trained_parts_get_gradients(digits):
    for keys in (ROBUST, ("distill.loss=smooth_l1", "recipe=official")):
        model, batch = batch_of(digits, *keys)
        terms = digits.terms(model.train(), batch)
        terms["kd"].backward()
        without = {
            name.partition(".mole_")[0]
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and parameter.grad is None
            and not ("router" in name and "recipe=official" in keys)  # no gate: only balance
        }
        unread = {name for name in without if "layers.5." in name}  # behind the layer that is read
        assert without == unread
        assert (
            model.adapters["sam"]
            .get_parameter("output.weight" if keys is ROBUST else "tokens.weight")
            .grad.abs()
            .sum()
        )


def test_accumulation_does_not_change_a_form(digits, tmp_path):
    logged = {}
    for size in (4, 1):
        keys = (
            f"training.per_device_train_batch_size={size}",
            f"training.gradient_accumulation_steps={4 // size}",
            "student.mole.balance_weight=0",  # F of the balance loss is that of a micro-batch
            "student.mole.lora_dropout=0",
            "training.max_steps=3",
        )
        run = digits.train(tmp_path / str(size), "distill", *ROBUST, *keys)
        logged[size] = [entry["loss_kd"] for entry in digits.logged(run)]
    assert logged[1] == pytest.approx(logged[4], rel=1e-4)


def test_a_limit_needs_targets_in_standard_deviations(digits):
    with pytest.raises(ConfigError, match=r"target_clip is 8 .*targets: raw are not measured in"):
        digits.config("pretrain", "recipe=official", "distill.target_clip=8")
    with pytest.raises(ConfigError, match=r"target_clip is 8 .*targets: scaled"):
        digits.config("pretrain", "distill.targets=scaled", "distill.target_clip=8")
    for wrong in ("distill.target_clip=-1", "distill.target_clip=.nan", "distill.loss=l1"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0].replace(".", r"\.")):
            digits.config("pretrain", wrong)


def test_a_later_default_does_not_reach_a_run_that_is_older_than_the_key(
    digits, tmp_path, monkeypatch
):
    write_run_files(tmp_path, digits.config(), {"global_batch_size": 4})
    path = tmp_path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    older = [line for line in lines if line.strip() not in ("loss: mse", "target_clip: 0.0")]
    assert len(lines) - len(older) == 2
    path.write_text("".join(older))

    def resume(*keys):
        return plan_start(digits.config("pretrain", *keys), tmp_path, resume=True, overwrite=False)

    assert resume().checkpoint is None
    later = RECIPES["revised"]["distill"]
    monkeypatch.setitem(later, "loss", "cosine+smooth_l1")
    monkeypatch.setitem(later, "target_clip", 8.0)
    with pytest.raises(ConfigError, match=r"distill\.loss, distill\.target_clip differ"):
        resume()
    assert resume("distill.loss=mse", "distill.target_clip=0").checkpoint is None
    # a default limit makes no config invalid that asks for other targets
    assert digits.config("pretrain", "distill.targets=scaled").distill.target_clip == 0
