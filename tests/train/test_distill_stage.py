"""Tests of stage distill: the encoder learns only from cached targets."""

import shutil
from dataclasses import replace

import pytest
import torch

from movekd.cache import open_cache
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import (
    CacheError,
    ConfigError,
    CorruptCacheError,
    UnknownKeyError,
    WeightsError,
)
from movekd.files.ownership import OWNERSHIP_FILE
from movekd.student.checkpoint import load_student
from movekd.train.encoder_data import EncoderDataset


def test_every_image_of_the_corpus_is_a_sample_with_its_own_targets(digits):
    corpus, cache = open_corpus(digits.data), open_cache(digits.cache)
    _, student, dataset, collator = digits.parts(digits.config("distill"))
    assert student.tokenizer is None
    keys = corpus.index["key"].to_pylist()
    assert [dataset[i].key for i in range(len(dataset))] == keys
    batch = collator([dataset[i] for i in (3, 0)])
    assert batch.keys() == {"keys", "pixel_values", "targets"}
    assert batch["keys"] == [keys[3], keys[0]]
    transform = student.image_transform("crop")
    for at, image in enumerate((3, 0)):
        expected = torch.from_numpy(transform(corpus.read_image(image)))
        assert torch.equal(batch["pixel_values"][at], expected)
        for name in ("clip", "sam"):
            alone = cache[name].read(cache.rows([keys[image]])).tokens_BND[0]
            assert torch.equal(batch["targets"][name].tokens_BND[at], alone)


def test_it_needs_neither_conversations_nor_a_language_model(digits, tmp_path):
    pack_folder(digits.source / "images", tmp_path / "data", num_workers=1)
    corpus = open_corpus(tmp_path / "data")
    assert corpus.conversations_path is None
    part = replace(digits, data=tmp_path / "data")
    with pytest.raises(UnknownKeyError):  # images of the test questions are not in the cache
        part.train(tmp_path / "run", "distill")
    summary = digits.train(tmp_path / "run", "distill", "student.language_model=nowhere")
    steps = digits.logged(summary)
    assert summary.steps == 9
    wanted = {"loss_kd", "loss_kd_clip", "loss_kd_sam", "loss_balance", "token_std"}
    wanted |= {"teacher_weight_clip", "teacher_weight_sam", "token_weight_entropy"}
    for step in steps:
        assert wanted <= step.keys()
        assert "loss_text" not in step
        expected = 2 * step["loss_kd"] + 0.01 * step["loss_balance"]
        assert step["loss"] == pytest.approx(expected, rel=1e-4)


def test_it_learns_and_does_not_collapse(digits, tmp_path):
    summary = digits.train(tmp_path, "distill", "training.num_train_epochs=6")
    steps = digits.logged(summary)
    assert steps[-1]["loss_kd"] < 0.8 * steps[0]["loss_kd"]
    assert steps[-1]["token_std"] > 0.8 * steps[0]["token_std"]
    files = {path.name for path in (tmp_path / "model").iterdir()}
    parts = {"mole_encoder.safetensors", "encoder_adapter.safetensors"}
    assert files == {"config.yaml", OWNERSHIP_FILE, *parts}


def test_pretrain_goes_on_from_it_and_it_from_pretrain(digits, tmp_path):
    digits.train(tmp_path / "distill", "distill", "training.max_steps=2", "recipe=revised_2026_11")
    still = ("training.max_steps=1", "training.learning_rate=0", "recipe=revised_2026_11")
    begin = f"init_from={tmp_path / 'distill'}"
    digits.train(tmp_path / "pretrain", "pretrain", begin, *still)
    first, second = digits.weights(tmp_path / "distill"), digits.weights(tmp_path / "pretrain")
    assert second.keys() > first.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    begin = f"init_from={tmp_path / 'pretrain'}"
    digits.train(tmp_path / "again", "distill", begin, *still)
    again = digits.weights(tmp_path / "again")
    assert again.keys() == first.keys()  # the projector stays where it was
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_whole_tower_may_learn(digits, tmp_path):
    keys = ["student.mole=null", "training.max_steps=2", "training.gradient_checkpointing=true"]
    digits.train(tmp_path / "moved", "distill", *keys)
    digits.train(tmp_path / "still", "distill", *keys, "training.learning_rate=0")
    moved, still = digits.weights(tmp_path / "moved"), digits.weights(tmp_path / "still")
    names = [name for name in moved if name.startswith("vision_tower")]
    changed = {name for name in names if not torch.equal(moved[name], still[name])}
    unread = {name for name in names if "layers.5." in name or "post_layernorm" in name}
    assert changed == set(names) - unread


def test_checkpointing_gives_the_same_losses(digits, tmp_path):
    keys = ["training.max_steps=2", "student.mole.lora_dropout=0.3"]
    plain = digits.train(tmp_path / "plain", "distill", *keys)
    checkpointing = "training.gradient_checkpointing=true"
    recomputed = digits.train(tmp_path / "recomputed", "distill", *keys, checkpointing)
    for one, two in zip(digits.logged(plain), digits.logged(recomputed), strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_skipped_images_are_left_out(digits, monkeypatch):
    corpus, cache = open_corpus(digits.data), open_cache(digits.cache)
    skipped = {2: "cannot be decoded", 5: "cannot be decoded"}
    monkeypatch.setattr(type(cache["sam"]), "skipped", skipped)
    dataset = EncoderDataset(corpus, cache, ["clip", "sam"])
    rows = {dataset[i].row for i in range(len(dataset))}
    assert rows == set(range(len(corpus))) - {2, 5}
    monkeypatch.setattr(type(cache["sam"]), "skipped", dict.fromkeys(range(len(corpus)), "no"))
    with pytest.raises(CacheError, match=r"of the 33 images .* none has features of all of clip"):
        EncoderDataset(corpus, cache, ["clip", "sam"])


def test_an_encoder_alone_is_neither_asked_nor_made_from_a_projector(digits, tmp_path):
    digits.train(tmp_path / "distill", "distill", "training.max_steps=1")
    with pytest.raises(ConfigError, match=r"an encoder of stage: distill.*init_from"):
        load_student(tmp_path / "distill")
    keys = ["student.mole=null", "distill=null", "training.max_steps=1"]
    digits.train(tmp_path / "projector", "pretrain", *keys)
    begin = f"init_from={tmp_path / 'projector'}"
    with pytest.raises(WeightsError, match=r"neither mole_encoder.*expects a run that trained the"):
        digits.train(tmp_path / "run", "distill", begin, "training.max_steps=1")


def test_verify_cache_refuses_a_flipped_byte_before_it_is_learned(digits, tmp_path):
    shutil.copytree(digits.cache, tmp_path / "cache")
    path = tmp_path / "cache" / "clip.zarr" / "tokens" / "c" / "0" / "0" / "0"
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 3] ^= 1
    path.write_bytes(changed)
    damaged = replace(digits, cache=tmp_path / "cache")
    with pytest.raises(CorruptCacheError, match=r"tokens/c/0/0/0 is damaged: .*its seal says"):
        damaged.train(tmp_path / "run", "distill", verify_cache=True)
