"""Tests of movekd.train.requirements: what a machine cannot do is said before anything loads."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from movekd.config import validate
from movekd.errors import ConfigError
from movekd.train.config import TrainConfig
from movekd.train.training_args import training_arguments
from movekd.train.training_keys import LearningRates


def config_of(training=None, **changes):
    """Return a run that exists nowhere, on a CPU."""
    content = {
        "recipe": "revised",
        "stage": "pretrain",
        "student": {"vision_tower": "tower", "language_model": "model"} | changes,
        "data": {"shards": "data"},
        "training": {"use_cpu": True, "report_to": "none"} | (training or {}),
    }
    return validate(TrainConfig, content, "student.yaml")


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            {"report_to": "mlflow"},
            r"names 'mlflow', whose package is not installed.*pip install ml",
        ),
        ({"report_to": ["tensorboard", "comet_ml"]}, r"names 'comet_ml'.*pip install comet-ml"),
        ({"report_to": "tensorbord"}, r"names 'tensorbord'; .* Did you mean 'tensorboard'"),
        ({"report_to": [{"a": 1}]}, r"report_to names .* expected none, or some of"),
        ({"torch_compile_backend": "inductr"}, r"is 'inductr'; .* Did you mean 'inductor'"),
        ({"optim": "adamw_torch_8bit"}, r"adamw_torch_8bit.*torchao"),
        ({"optim": "schedule_free_adamw"}, r"install `schedulefree`"),
        ({"optim": "sgd", "optim_args": "momentum"}, r"holds 'momentum'; expected pairs, as in"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, r"'sgd' with optim_args.*'much'"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, r"'momentun=0\.9', which changes nothing"),
        ({"optim_args": "momentum=0.9"}, r"changes nothing of optim 'adamw_torch"),
        ({"optim_args": {"momentum": 0.9}}, r"training: optim_args: .*string"),
        ({"lr_scheduler_kwargs": {"num_cycle": 1}}, r"'cosine' cannot be made: .*num_cycle"),
        ({"lr_scheduler_kwargs": {"num_cycles": "a"}}, r"'cosine' cannot be made: "),
        ({"lr_scheduler_kwargs": "abc"}, r"lr_scheduler_kwargs is abc, .* cannot be made"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"x": 1}},
            r"'constant' takes none",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"kwargs is None, .*min_lr"),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"offload": True},
            },
            r"offload activations.*a run on a CPU has them already",
        ),
    ],
)
def test_what_cannot_be_done_is_a_sentence(tmp_path, training, said):
    with pytest.raises(ConfigError, match=said) as caught:
        training_arguments(config_of(training), tmp_path)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize(
    "training",
    [
        {"report_to": None},
        {"report_to": ["tensorboard"]},
        {"optim": "adafactor"},
        {"optim": "adamw_8bit"},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2}'},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 9}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": '{"debug": true}'},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
)
def test_what_can_be_done_is_accepted(tmp_path, training):
    training_arguments(config_of(training), tmp_path)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"use_liger_kernel": True}, r"would change nothing: .*Liger's loss of a LLaVA"),
        ({"label_smoothing_factor": 0.1}, r"is 0\.1, and would change nothing: .*no smoothing"),
        ({"neftune_noise_alpha": 5}, r"adds no noise"),
        ({"train_sampling_strategy": "sequential"}, r"data\.group_by_modality_length"),
        ({"group_by_length": True}, r"data\.group_by_modality_length groups"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": True}},
            r"use_reentrant: expected false: reentrant checkpointing loses",
        ),
        ({"activation_checkpointing_kwargs": {"every_n_layer": 2}}, r"unknown key .*every_n_layer"),
        ({"gradient_checkpointing_kwargs": "abc"}, r"expected a mapping, or one as JSON"),
    ],
)
def test_what_a_run_would_not_heed_is_a_sentence(training, said):
    with pytest.raises(ConfigError, match=said):
        config_of(training)


def test_wandb_needs_a_key_or_no_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="not installed for tests: 60 MB")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    training_arguments(config_of({"report_to": "wandb"}), tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ConfigError, match=r"has no API key here .* WANDB_MODE=offline"):
        training_arguments(config_of({"report_to": "wandb"}), tmp_path)


def test_flash_attention_is_refused_on_a_cpu_with_all_that_it_lacks(tmp_path):
    config = config_of(attn_implementation="flash_attention_2")
    with pytest.raises(
        ConfigError,
        match=r"on a CPU and the package flash-attn is not installed and .* in float32; .*sdpa",
    ):
        training_arguments(config, tmp_path)


def test_rates_of_parts_need_an_optimizer_that_reads_groups(tmp_path):
    config = config_of({"optim": "adalomo"})
    none = config.model_copy(update={"learning_rates": LearningRates()})
    training_arguments(none, tmp_path)
    some = config.model_copy(update={"learning_rates": LearningRates(mole=1e-4)})
    with pytest.raises(ConfigError, match=r"'adalomo', which takes one learning rate for all"):
        training_arguments(some, tmp_path)


def test_a_machine_without_a_compiler_does_not_compile(tmp_path, monkeypatch):
    training_arguments(config_of({"torch_compile": True}), tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"builds kernels with no-such-compiler, which is not"):
        training_arguments(config_of({"torch_compile": True}), tmp_path)


def test_both_kinds_of_attention_train_alike(digits, tmp_path, monkeypatch):
    original, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    logged, counts = {}, {}
    for kind in ("eager", "sdpa"):
        calls.clear()
        keys = (f"student.attn_implementation={kind}", "training.max_steps=1")
        logged[kind] = digits.logged(digits.train(tmp_path / kind, "finetune", *keys))
        counts[kind] = len(calls)
    assert counts["eager"] == 0
    assert counts["sdpa"] > 6  # blocks of the tower, and of the language model
    for one, other in zip(logged["eager"], logged["sdpa"], strict=True):
        for name in ("loss", "loss_text", "loss_kd", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_checkpointing_changes_no_weight_and_saves_fewer_activations(digits, tmp_path):
    ways = {
        "none": (),
        "gradient": ("training.gradient_checkpointing=true",),
        "second": (
            "training.activation_checkpointing=true",
            "training.activation_checkpointing_kwargs={every_n_layers: 2}",
        ),
    }
    saved, weights = {}, {}
    for way, keys in ways.items():
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            digits.train(tmp_path / way, "finetune", *keys, "training.max_steps=1")
        saved[way], weights[way] = sum(sizes), digits.weights(tmp_path / way)
    assert saved["gradient"] < saved["second"] < saved["none"]
    for way in ("gradient", "second"):
        assert weights[way].keys() == weights["none"].keys()
        for name, expected in weights["none"].items():
            torch.testing.assert_close(weights[way][name], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo turns a warning that is an error into its own
@pytest.mark.parametrize(
    ("stage", "experts"),
    [("distill", "shared"), ("finetune", "shared"), ("distill", "per_teacher")],
)
def test_a_compiled_student_trains_as_an_eager_one(digits, tmp_path, stage, experts):
    keys = ("training.max_steps=3", "student.mole.lora_dropout=0")
    keys += (f"student.mole.experts={experts}",)
    eager = digits.train(tmp_path / "eager", stage, *keys)
    torch.compiler.reset()
    compiled = digits.train(tmp_path / "compiled", stage, *keys, "training.torch_compile=true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one, other in zip(digits.logged(eager), digits.logged(compiled), strict=True):
        for name in ("loss", *{"loss_text", "loss_kd"} & one.keys()):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name
    assert digits.weights(tmp_path / "eager").keys() == digits.weights(tmp_path / "compiled").keys()
