"""Exports of a run with LoRA on its language model: merged, or as an adapter for PEFT."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from exports import export, export_and_check
from movekd.errors import ConfigError, WeightsError
from movekd.student.checkpoint import TrainedStudent, load_student, save_parts
from movekd.student.config import LanguageModelLoraKeys
from movekd.student.export.check import check_exports
from movekd.student.language_lora import (
    LORA_DIR,
    LORA_FILE,
    LORA_PART,
    adapter_parameters,
    has_adapter,
)
from movekd.student.official.import_checkpoint import import_official

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT's

LORA = LanguageModelLoraKeys(r=4, lora_alpha=8)


def lora_run(kit, folder) -> TrainedStudent:
    """Write a run whose experts, projector and adapter have learned; return it."""
    trained = kit.make_run(folder, kit.OFFICIAL, "pretrain", language_model_lora=LORA)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter_parameters(trained.student.vlm).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_parts(folder / "model", trained.student.vlm, [LORA_PART])
    return trained


@pytest.fixture(scope="module")
def run(kit, tmp_path_factory):
    return lora_run(kit, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def answer(text_and_image):
    """Return the logits of a student or a model for the same question."""

    def answer(student, model=None):
        with torch.no_grad():
            return (model or student.vlm)(**text_and_image(student)).logits

    return answer


def assert_close(found, expected):
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """Folder with both forms of the format hf."""
    folder = tmp_path_factory.mktemp("exports")
    for lora in ("merged", "adapter"):
        export(run, "hf", folder / lora, lora=lora)
    return folder


def test_merged_is_a_plain_llava_with_the_logits_of_the_run(run, exports, answer):
    assert not (exports / "merged" / LORA_DIR).exists()
    assert has_adapter(run.student.vlm)  # the student that was given is as it was
    found = load_student(exports / "merged")
    assert not has_adapter(found.student.vlm)
    assert_close(answer(found.student), answer(run.student))
    card = (exports / "merged/README.md").read_text()
    assert "| LoRA on the language model | r 4, lora_alpha 8 |" in card
    assert LORA_DIR not in card


def test_beside_the_weights_it_is_loaded_by_peft_and_by_movekd(run, exports, answer):
    folder = exports / "adapter"
    found = load_student(folder)
    assert has_adapter(found.student.vlm)
    assert torch.equal(answer(found.student), answer(run.student))
    merged = load_student(folder, language_lora="merged")
    assert not has_adapter(merged.student.vlm)
    assert_close(answer(merged.student), answer(run.student))
    stock, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = answer(run.student, stock)
    stock = PeftModel.from_pretrained(stock, folder / LORA_DIR).eval()
    assert_close(answer(run.student, stock), answer(run.student))
    assert (base - answer(run.student)).abs().max() > 1e-3
    assert "PeftModel.from_pretrained(model, " in (folder / "README.md").read_text()


@pytest.mark.slow
def test_an_export_of_an_export_merges(exports, tmp_path, answer, run):
    export(load_student(exports / "adapter"), "hf", tmp_path / "again")
    assert_close(answer(load_student(tmp_path / "again").student), answer(run.student))


def test_the_official_format_gets_the_merged_weights(run, tmp_path, answer, kit):
    export(run, "official", tmp_path / "out")
    base = str(kit.WEIGHTS / "language_model")
    tower = str(kit.WEIGHTS / "clip")
    import_official(tmp_path / "out", tmp_path / "back", vision_tower=tower, tokenizer=base)
    back = load_student(tmp_path / "back")
    assert_close(answer(back.student)[..., :66], answer(run.student)[..., :66])


@pytest.mark.slow
def test_an_encoder_has_no_part_of_it(run, tmp_path):
    export(run, "encoder", tmp_path / "encoder")
    tensors = load_file(tmp_path / "encoder/model.safetensors")
    assert not any("lora" in name and "mole_" not in name for name in tensors)
    assert not (tmp_path / "encoder" / LORA_DIR).exists()


@pytest.mark.parametrize("kind", ["official", "encoder"])
def test_an_adapter_beside_the_weights_is_only_of_hf(run, tmp_path, kind):
    with pytest.raises(ConfigError, match=rf"--lora adapter was given for --format {kind}"):
        export(run, kind, tmp_path / "out", lora="adapter")


def test_a_run_without_lora_has_no_adapter_to_write(official, tmp_path):
    with pytest.raises(ConfigError, match=r"expected --format hf, and a run with student\.lang"):
        export(official, "hf", tmp_path / "out", lora="adapter")


def test_an_export_without_its_adapter_is_refused(exports, tmp_path):
    shutil.copytree(exports / "adapter", tmp_path / "copy")
    (tmp_path / "copy" / LORA_FILE).unlink()
    with pytest.raises(WeightsError, match=r"language_model_lora/adapter_model\.safetensors is mi"):
        load_student(tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_a_fresh_process_agrees_with_the_run(run, tmp_path, lora):
    said = export_and_check(run, "hf", tmp_path / "out", lora=lora)
    assert "transformers agrees with the run" in said


@pytest.mark.slow
def test_a_changed_adapter_is_found(run, exports, tmp_path):
    shutil.copytree(exports / "adapter", tmp_path / "copy")
    path = tmp_path / "copy" / LORA_FILE
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "scratch").mkdir()
    (found,) = check_exports([(run, "hf", tmp_path / "copy")], tmp_path / "scratch")
    assert "1 weights have other values" in str(found)


def test_movekd_json_says_how_the_adapter_is_scaled(exports):
    about = json.loads((exports / "adapter/movekd.json").read_text())
    assert about["language_model_lora"]["lora_alpha"] == 8
    assert "language_model_lora" not in json.loads((exports / "merged/movekd.json").read_text())


def test_a_run_in_4_bit_is_exported_without_bitsandbytes_and_says_so(kit, tmp_path):
    lora_run(kit, tmp_path)
    content = json.loads((tmp_path / "model/config.yaml").read_text())
    content["student"]["load_in_4bit"] = True
    (tmp_path / "model/config.yaml").write_text(json.dumps(content))
    trained = load_student(tmp_path, language_lora="merged")
    said = export(trained, "hf", tmp_path / "out")
    assert "held the language model in 4 bit; the export" in said
    assert "4 bit; exports hold its original" in (tmp_path / "out/README.md").read_text()
