"""Tests of movekd.student.language_loading: 4-bit weights, and which checkpoints are refused."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import scenes
from movekd.errors import ConfigError
from movekd.student import language_loading
from movekd.student.checkpoint import load_parts, load_student, save_parts
from movekd.student.config import LanguageModelLoraKeys, StudentConfig
from movekd.student.language_loading import is_in_4bit
from movekd.student.language_lora import LORA_DIR, LORA_PART, adapter_parameters
from movekd.student.vlm import build_vlm

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT's

WEIGHTS = Path(scenes.__file__).parent / "weights"
LORA = LanguageModelLoraKeys(r=4, lora_alpha=8, lora_dropout=0)
IDS = torch.tensor([[1, 7, 30, 12, 44, 9, 3]])


def config(**keys):
    paths = {"vision_tower": WEIGHTS / "clip", "language_model": WEIGHTS / "language_model"}
    fixed = {name: str(path) for name, path in paths.items()} | {"mole": None, "prompt": "v1"}
    return StudentConfig(**(fixed | keys))


def build(**keys):
    torch.manual_seed(3)
    return build_vlm(config(**keys)).vlm.eval()


def qlora(dtype="float32"):
    """Return a model in 4 bit whose adapter has learned something."""
    vlm = build(load_in_4bit=True, language_model_lora=LORA, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter_parameters(vlm).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vlm


def stock():
    """Return the language model in 4 bit, as transformers and bitsandbytes make it.

    In training mode: in evaluation some CPUs compute with bfloat16 scales.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    folder = WEIGHTS / "language_model"
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization
    ).train()


def logits(vlm):
    with torch.no_grad():
        return vlm(input_ids=IDS).logits


def test_a_checkpoint_that_is_quantised_is_refused(tmp_path):
    shutil.copytree(WEIGHTS / "language_model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"holds quantised weights.*load_in_4bit: true"):
        build(language_model=str(tmp_path / "model"))


def test_without_bitsandbytes_a_sentence_says_what_to_install(monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(language_loading, "version", not_installed)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes 0\.50 .* 'movekd\[qlora\]'"):
        build(load_in_4bit=True)


def test_only_the_linear_layers_are_in_4_bit_and_only_the_rest_can_learn():
    vlm = build(load_in_4bit=True)
    assert is_in_4bit(vlm)
    assert not is_in_4bit(build())
    in_4bit = {name for name, p in vlm.named_parameters() if not p.is_floating_point()}
    expected = {
        name
        for name, module in vlm.named_modules()
        if type(module).__name__ == "Linear4bit" and "language_model" in name
    }
    assert in_4bit == {f"{name}.weight" for name in expected}
    assert len(expected) == 4 * 7  # blocks; q, k, v, o, gate, up, down
    assert all(p.requires_grad == p.is_floating_point() for p in vlm.parameters())


def test_the_weights_are_those_that_transformers_makes():
    found = logits(build(load_in_4bit=True))[..., :66]
    torch.testing.assert_close(found, logits(stock()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_4_bit_is_saved_loaded_and_read_by_stock_peft(tmp_path, dtype):
    vlm = qlora(dtype)
    save_parts(tmp_path, vlm, [LORA_PART, "projector"])
    student = config(load_in_4bit=True, language_model_lora=LORA, dtype=dtype)
    content = {"student": student.model_dump(mode="json"), "data": {"geometry": "crop"}}
    (tmp_path / "config.yaml").write_text(json.dumps(content))
    found = load_student(tmp_path).student.vlm
    assert torch.equal(logits(found), logits(vlm))
    if dtype == "float32":
        peft = PeftModel.from_pretrained(stock(), tmp_path / LORA_DIR).train()
        torch.testing.assert_close(logits(peft), logits(vlm)[..., :66], rtol=1e-5, atol=1e-5)


def test_merging_takes_the_original_base(tmp_path):
    """Not the 4-bit values: the result is what LoRA on full weights gives."""
    vlm = qlora()
    save_parts(tmp_path, vlm, [LORA_PART, "projector"])
    student = config(load_in_4bit=True, language_model_lora=LORA)
    content = {"student": student.model_dump(mode="json"), "data": {"geometry": "crop"}}
    (tmp_path / "config.yaml").write_text(json.dumps(content))
    merged = load_student(tmp_path, language_lora="merged").student.vlm
    assert all(p.is_floating_point() for p in merged.parameters())
    full = build(language_model_lora=LORA)
    load_parts(tmp_path, full)
    scale = logits(full).abs().max()
    assert (logits(merged) - logits(full)).abs().max() < 1e-5 * scale
    rounding = (logits(build(load_in_4bit=True)) - logits(build())).abs().max()
    assert 0 < (logits(merged) - logits(vlm)).abs().max() < 3 * rounding


def test_weights_that_are_in_4_bit_take_no_others(tmp_path):
    save_parts(tmp_path / "full", build(), ["language_model"])
    save_parts(tmp_path / "lora", build(language_model_lora=LORA), [LORA_PART])
    vlm = build(load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"holds fixed in 4 bit.*Set load_in_4bit: false\."):
        load_parts(tmp_path / "full", vlm)
    with pytest.raises(ConfigError, match=r"false, or student\.language_model_lora as that run"):
        load_parts(tmp_path / "lora", vlm)


def test_an_evaluation_changes_neither_weights_nor_later_gradients():
    """On some CPUs bitsandbytes packs the weights anew at the first evaluation, and never back."""
    vlm = build(load_in_4bit=True, language_model_lora=LORA)

    def gradients():
        vlm.zero_grad()
        vlm.train()(input_ids=IDS, labels=IDS).loss.backward()
        vlm.eval()
        return {n: p.grad.clone() for n, p in adapter_parameters(vlm).items()}

    before, weights = gradients(), [p.detach().clone() for p in vlm.parameters()]
    logits(vlm)
    after = gradients()
    assert all(torch.equal(p, w) for p, w in zip(vlm.parameters(), weights, strict=True))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(bool(g.abs().sum() > 0) for g in before.values()) == 4 * 7  # the second factors


def test_lora_on_a_model_that_no_llava_can_hold_is_no_bug(tmp_path):
    """GPT-2 has no `model`; what refuses it is the check of its output layer."""
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 66, "n_positions": 16}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not consist of `model` and an output layer"):
        build(language_model=str(tmp_path), language_model_lora=LORA)


def test_importing_the_student_says_nothing():
    """PEFT imports bitsandbytes, which would warn on some CPUs."""
    code = "import movekd.student, sys; assert 'bitsandbytes' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
