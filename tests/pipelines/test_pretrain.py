"""The committed weights match their hashes and load with stock loaders; their script works."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import language
import pretrain
import scenes
from movekd.cache.spec import load_spec
from movekd.teachers import load_teacher

DIGITS = Path(pretrain.__file__).parent
WEIGHTS = DIGITS / "weights"
TEACHERS = ("clip", "eva", "convnext", "sam")
GRIDS = {"clip": 36, "eva": 64, "convnext": 36, "sam": 144}


@pytest.fixture(scope="module")
def val() -> scenes.Scenes:
    return pretrain.draw_scenes(64, "val", seed=5)


def test_weights_are_those_of_the_hash_file_and_small() -> None:
    lines = (WEIGHTS / "SHA256SUMS").read_text().splitlines()
    recorded = dict(reversed(line.split("  ")) for line in lines)
    found = {
        str(path.relative_to(WEIGHTS)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in WEIGHTS.glob("*/*")
    }
    assert found == recorded
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 6e6


def test_what_each_model_reached_is_recorded() -> None:
    results = json.loads((WEIGHTS / "training.json").read_text())
    assert set(results) == set(pretrain.MODELS)
    for name, result in results.items():
        assert result.keys() >= {"date", "seed", "steps", "seconds", "measure"}
        recipe = pretrain.RECIPES.get(name)
        assert result["steps"] == (recipe.steps if recipe else pretrain.LANGUAGE_STEPS)


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_loads_whole_with_its_own_library(name: str) -> None:
    stored = load_file(WEIGHTS / name / "model.safetensors")
    floats = [tensor for tensor in stored.values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in floats)
    if name == "eva":
        import timm

        config = json.loads((WEIGHTS / name / "config.json").read_text())
        model = timm.create_model(config["architecture"], pretrained=False, **config["model_args"])
        model.load_state_dict(stored, strict=True)
    else:
        model = AutoModel.from_pretrained(WEIGHTS / name)
        assert model.state_dict().keys() == stored.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), stored[key].float()), key


@pytest.mark.parametrize("name", TEACHERS)
def test_spec_describes_the_teacher(name: str, val: scenes.Scenes) -> None:
    spec = load_spec(str(DIGITS / "teachers" / f"{name}.yaml"))
    assert (spec.name, spec.grid, spec.codec) == (name, 6, "int8")
    assert spec.mean == (pretrain.MEAN,) * 3
    assert spec.std == (pretrain.STD,) * 3
    teacher = load_teacher(spec)
    output = teacher(pretrain.pixels(val.images_BHW[:4]))
    assert output.tokens_BND.shape[:2] == (4, GRIDS[name])
    assert (output.cls_BD is not None) == (name == "clip")
    assert output.tokens_BND.isfinite().all()
    assert output.tokens_BND.std() > 0.1


@pytest.mark.parametrize("name", TEACHERS)
def test_features_tell_digits_apart(name: str) -> None:
    """A ridge regression on a digit's pooled patch features beats guessing on new scans."""
    spec = load_spec(str(DIGITS / "teachers" / f"{name}.yaml"))
    teacher = load_teacher(spec)
    parts = []
    for split in ("train", "val"):
        batch = pretrain.draw_scenes(256, split, seed=6)  # type: ignore[arg-type]
        tokens_BND = teacher(pretrain.pixels(batch.images_BHW)).tokens_BND
        side = int(tokens_BND.shape[1] ** 0.5) // 2
        cells = tokens_BND.unflatten(1, (2, side, 2, side)).permute(0, 1, 3, 2, 4, 5)
        cells = cells.flatten(3, 5).flatten(1, 2)[torch.from_numpy(batch.digits_BC) >= 0]
        digits = torch.from_numpy(batch.digits_BC[batch.digits_BC >= 0])
        parts.append((cells, digits))
    (train, digits), (val, truth) = parts
    mean, std = train.mean(0), train.std(0) + 1e-3
    train, val = (train - mean) / std, (val - mean) / std
    gram = train @ train.T + 300 * torch.eye(len(train))
    weights = train.T @ torch.linalg.solve(gram, torch.eye(10)[digits] - 0.1)
    accuracy = ((val @ weights).argmax(1) == truth).float().mean()
    assert accuracy > 0.3


def test_language_model_answers_from_true_grids() -> None:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "language_model")
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / "language_model", dtype=torch.float32)
    masks_M33 = language.cell_masks(pretrain.draw_scenes(64, "test", seed=7))
    accuracy = language.answer_accuracy(model.eval(), tokenizer, masks_M33, 25, seed=8)
    assert accuracy["all"] >= 0.9


def test_training_text_is_what_the_chat_template_writes() -> None:
    tokenizer = language.build_tokenizer()
    questions = [("Is there a 3?", "yes"), ("What is the sum of the digits?", "12")]
    messages = [
        {"role": role, "content": text}
        for turn in questions
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages[0]["content"] = "<image>\n" + messages[0]["content"]
    template = tokenizer.apply_chat_template(messages, tokenize=False)
    ours = tokenizer(language.chat_text("<image>", questions), add_special_tokens=False)
    assert tokenizer(template, add_special_tokens=False).input_ids == ours.input_ids
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(asked, add_special_tokens=False).input_ids
    assert ids == ours.input_ids[: len(ids)]


def test_tokenizer_knows_every_word_of_the_corpus_as_one_token() -> None:
    tokenizer = language.build_tokenizer()
    rng = np.random.default_rng(9)
    digits_BC, questions = scenes.draw_questions(200, rng, 4)
    texts = [" ".join((q, a)) for turns in questions for _, q, a in turns]
    texts += [scenes.caption(digits_C) for digits_C in digits_BC]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer("<image> Is there a 36?</s>").input_ids) == (
        "<s> <image> is there a 36 ? </s>"
    )
    assert len(tokenizer("<image>").input_ids) == 2


def test_labels_are_the_answers_and_captions_alone() -> None:
    tokenizer = language.build_tokenizer()
    grid = " ".join(["empty"] * 36)
    chat = language.chat_text(grid, [("Is there a 3?", "yes"), ("Is there a 4?", "no")])
    caption = f"<s>{grid} a 7 at the top left.</s>"
    _, labels_BT = language.encode([chat, caption], tokenizer)
    said = [tokenizer.decode(labels_T[labels_T >= 0]) for labels_T in labels_BT]
    assert said == ["yes </s> no </s>", "a 7 at the top left . </s>"]


@pytest.mark.parametrize("name", TEACHERS)
def test_training_lowers_the_loss_and_saves_what_it_trained(
    name: str, val: scenes.Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pretrain.replace(pretrain.RECIPES[name], steps=2, batch_size=8)
    few = pretrain.take(val, slice(0, 8))
    first, _ = pretrain.train_teacher(name, recipe, few, few, seed=0)
    again, _ = pretrain.train_teacher(name, recipe, few, few, seed=0)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    pretrain.save_teacher(first, tmp_path / name)
    stored = load_file(tmp_path / name / "model.safetensors")
    assert stored.keys() == first.state_dict().keys()
    pretrain.record_training(tmp_path, name, {"steps": 2})
    assert f"{name}/model.safetensors" in (tmp_path / "SHA256SUMS").read_text()
