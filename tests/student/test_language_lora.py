"""Tests of movekd.student.language_lora: what has an adapter, its files, and merging."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import scenes
from movekd.errors import ConfigError, WeightsError
from movekd.student.checkpoint import load_parts, load_student, save_parts
from movekd.student.config import LanguageModelLoraKeys, MoleKeys, StudentConfig
from movekd.student.language_lora import (
    LORA_CONFIG_FILE,
    LORA_DIR,
    LORA_FILE,
    LORA_PART,
    adapter_parameters,
    has_adapter,
)
from movekd.student.vlm import build_vlm

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT's

WEIGHTS = Path(scenes.__file__).parent / "weights"
LORA = LanguageModelLoraKeys(r=4, lora_alpha=8)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A small Qwen3 with random weights, and the tokenizer of digits."""
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=66,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(WEIGHTS / "language_model" / name, folder / name)
    return folder


@pytest.fixture(params=[pytest.param("llama", marks=pytest.mark.slow), "qwen3"])
def language_model(request):
    """Folder of a language model."""
    if request.param == "llama":
        return WEIGHTS / "language_model"
    return request.getfixturevalue("qwen3")


def config_of(language_model, lora=LORA, **keys):
    return StudentConfig(
        vision_tower=str(WEIGHTS / "clip"),
        language_model=str(language_model),
        language_model_lora=lora,
        prompt="v1",
        **({"mole": None} | keys),
    )


def build(language_model, lora=LORA, **keys):
    """Return the model of a student, not trained yet."""
    torch.manual_seed(3)
    return build_vlm(config_of(language_model, lora, **keys)).vlm.eval()


def trained(language_model, **keys):
    """Return a model whose adapter has learned something."""
    vlm = build(language_model, **keys)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter_parameters(vlm).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vlm


IDS = torch.tensor([[1, 7, 30, 12, 44, 9, 3]])


def logits(vlm, ids=IDS):
    with torch.no_grad():
        return vlm(input_ids=ids).logits


def write_run(folder, vlm, language_model, **keys):
    """Write the model folder of a run whose adapter and projector have learned."""
    save_parts(folder, vlm, [LORA_PART, "projector"])
    student = config_of(language_model, **keys).model_dump(mode="json")
    content = {"student": student, "data": {"geometry": "crop"}}
    (folder / "config.yaml").write_text(json.dumps(content))
    return folder


def test_a_new_adapter_changes_neither_the_logits_nor_other_random_numbers(language_model):
    mole = MoleKeys(r=2, lora_alpha=2, use_gate=True, init_lora_weights="kaiming")
    plain, with_lora = (build(language_model, lora, mole=mole) for lora in (None, LORA))
    assert torch.equal(logits(plain), logits(with_lora))
    there = dict(with_lora.named_parameters())
    for name, parameter in plain.named_parameters():
        if ".language_model.layers" not in name:
            assert torch.equal(parameter, there[name]), name


def test_every_linear_layer_of_the_language_model_has_one_and_no_other(language_model):
    """As LLaVA's find_all_linear_names: neither the tower, the projector nor lm_head."""
    plain, vlm = build(language_model, None), build(language_model)
    expected = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear)
        and not any(word in name for word in ("vision_tower", "projector", "lm_head"))
    }
    found = {
        name.partition(".lora_A.")[0] for name, _ in vlm.named_parameters() if "lora_A" in name
    }
    assert found == expected
    assert all(p.dtype == torch.float32 for p in adapter_parameters(vlm).values())


def test_a_list_names_the_layers(qwen3):
    vlm = build(qwen3, LORA.model_copy(update={"target_modules": ["q_proj", "self_attn.v_proj"]}))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_parameters(vlm)}
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("q_prj", r"names 'q_prj'; expected .* down_proj, .*Did you mean 'q_proj'"),
        ("lm_head", r"names 'lm_head'; expected linear layers of the language model's blocks"),
        ("embed_tokens", r"names 'embed_tokens'"),
        ("proj", r"names 'proj'"),
    ],
)
def test_an_unknown_layer_is_named_before_any_weights_are_read(qwen3, tmp_path, name, said):
    shutil.copytree(qwen3, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"")  # reading them would be an error
    lora = LORA.model_copy(update={"target_modules": ["q_proj", name]})
    with pytest.raises(ConfigError, match=said):
        build(tmp_path / "model", lora)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_gives_the_same_logits(language_model, tmp_path, dtype):
    vlm = trained(language_model, dtype=dtype)
    write_run(tmp_path, vlm, language_model, dtype=dtype)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {LORA_FILE, LORA_CONFIG_FILE, "mm_projector.safetensors", "config.yaml"}
    found = load_student(tmp_path).student.vlm
    assert has_adapter(found)
    assert torch.equal(logits(found), logits(vlm))
    assert not torch.equal(logits(found), logits(build(language_model, dtype=dtype)))


def test_merged_gives_the_logits_of_the_adapter(language_model, tmp_path):
    vlm = trained(language_model)
    write_run(tmp_path, vlm, language_model)
    merged = load_student(tmp_path, language_lora="merged").student.vlm
    plain = build(language_model, None)
    assert [name for name, _ in merged.named_parameters()] == [
        n for n, _ in plain.named_parameters()
    ]
    scale = logits(vlm).abs().max()
    assert (logits(merged) - logits(vlm)).abs().max() < 1e-5 * scale
    assert (logits(plain) - logits(vlm)).abs().max() > 1e-2 * scale


def test_stock_peft_loads_the_adapter_onto_the_stock_base(language_model, tmp_path):
    vlm = trained(language_model)
    save_parts(tmp_path, vlm, [LORA_PART])
    base = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, tmp_path / LORA_DIR).eval()
    torch.testing.assert_close(logits(stock), logits(vlm)[..., :66], rtol=1e-6, atol=1e-6)
    written = json.loads((tmp_path / LORA_CONFIG_FILE).read_text())
    assert written["base_model_name_or_path"] == str(language_model)
    assert written["target_modules"] == sorted(written["target_modules"])


STOCK = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=load_file(sys.argv[2])["ids"]).logits
save_file({"logits": logits}, sys.argv[3])
assert "movekd" not in sys.modules
"""


@pytest.mark.slow
def test_stock_peft_loads_the_adapter_in_a_fresh_process(language_model, tmp_path):
    from safetensors.torch import load_file, save_file

    vlm = trained(language_model)
    save_parts(tmp_path, vlm, [LORA_PART])
    save_file({"ids": IDS}, tmp_path / "ids")
    paths = (tmp_path / LORA_DIR, tmp_path / "ids", tmp_path / "logits")
    subprocess.run([sys.executable, "-c", STOCK, *map(str, paths)], check=True)
    found = load_file(tmp_path / "logits")["logits"]
    torch.testing.assert_close(found, logits(vlm)[..., :66], rtol=1e-6, atol=1e-6)


def test_a_base_that_learned_before_keeps_its_plain_names(qwen3, tmp_path):
    """A full finetune, and an adapter on top: two files, and the base is not the published one."""
    vlm = trained(qwen3)
    save_parts(tmp_path / "one", build(qwen3, None), ["language_model"])
    save_parts(tmp_path / "two", vlm, ["language_model", LORA_PART])
    assert (
        json.loads((tmp_path / "two" / LORA_CONFIG_FILE).read_text())["base_model_name_or_path"]
        is None
    )
    one, two = ((tmp_path / n / "language_model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    fresh = build(qwen3)
    assert load_parts(tmp_path / "two", fresh) == ["language_model", LORA_PART]
    assert torch.equal(logits(fresh), logits(vlm))


def test_a_run_without_its_adapter_is_refused(qwen3, tmp_path):
    write_run(tmp_path, trained(qwen3), qwen3)
    (tmp_path / LORA_FILE).unlink()
    for how in ("as trained", "merged"):
        with pytest.raises(WeightsError, match=r"lacks language_model_lora/adapter_model\.safe"):
            load_student(tmp_path, language_lora=how)


def test_an_adapter_without_its_scale_is_refused(qwen3, tmp_path):
    write_run(tmp_path, trained(qwen3), qwen3)
    content = json.loads((tmp_path / "config.yaml").read_text())
    content["student"]["language_model_lora"] = None
    (tmp_path / "config.yaml").write_text(json.dumps(content))
    with pytest.raises(
        WeightsError, match=r"is an adapter, but .* no student\.language_model_lora"
    ):
        load_student(tmp_path)


def test_an_adapter_of_another_rank_does_not_fit(qwen3, tmp_path):
    save_parts(tmp_path, trained(qwen3), [LORA_PART])
    other = build(qwen3, LORA.model_copy(update={"r": 2}))
    with pytest.raises(WeightsError, match=r"does not fit the model: 28 of another shape"):
        load_parts(tmp_path, other)
