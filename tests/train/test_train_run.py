"""Tests of movekd.train.run: whole runs, interrupted and resumed, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import set_seed

import scenes
from movekd.cache import open_cache
from movekd.cache.spec import load_spec
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.errors import CacheError, ConfigError, MovekdError, TrainingError, UnknownKeyError
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.student.checkpoint import load_student, part_of
from movekd.student.vlm import build_vlm
from movekd.train.run import train
from movekd.train.run_dir import last_checkpoint

SAVING = ("training.save_strategy=steps", "training.save_total_limit=null")
OFFICIAL = (
    "recipe=official",
    "student.mole.init_lora_weights=kaiming",
    "student.mole.lora_dropout=0.2",
)


def stop_at(step, error=KeyboardInterrupt):
    """Return a progress function that interrupts the run when ``step`` is done."""

    def progress(what, done, total):
        if done == step:
            raise error

    return progress


def assert_same_weights(digits, first, second):
    left, right = digits.weights(first), digits.weights(second)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.mark.parametrize(
    ("stage", "stops", "overrides"),
    [
        ("pretrain", (1, 4), ("training.save_steps=1",)),
        ("pretrain", (5,), ("training.save_steps=2", "student.mole.lora_dropout=0.3")),
        ("pretrain", (3,), ("training.save_steps=1", *OFFICIAL)),
        (
            "pretrain",
            (3, 9),  # the second in epoch 2
            (
                "training.save_steps=2",
                "training.num_train_epochs=2",
                "training.dataloader_num_workers=1",
                "student.mole.lora_dropout=0.3",
            ),
        ),
        (
            "finetune",
            (2, 6),
            (
                "training.save_steps=1",
                "training.num_train_epochs=2",
                "student.mole.lora_dropout=0.3",
            ),
        ),
        (
            "finetune",
            (2,),
            ("training.save_steps=1", "training.gradient_accumulation_steps=2"),
        ),
        (
            "distill",
            (4, 12),  # the second in epoch 2
            (
                "training.save_steps=2",
                "training.num_train_epochs=2",
                "training.dataloader_num_workers=1",
                "student.mole.lora_dropout=0.3",
            ),
        ),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(digits, tmp_path, stage, stops, overrides):
    whole = digits.train(tmp_path / "whole", stage, *SAVING, *overrides)
    for number, step in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            digits.train(
                tmp_path / "parts",
                stage,
                *SAVING,
                *overrides,
                resume=number > 0,
                progress=stop_at(step),
            )
    parts = digits.train(tmp_path / "parts", stage, *SAVING, *overrides, resume=True)
    assert parts.steps == whole.steps
    assert_same_weights(digits, tmp_path / "whole", tmp_path / "parts")
    assert digits.logged(parts) == digits.logged(whole)
    assert len(digits.logged(whole)) == whole.steps


def test_terms_logged_after_a_resume_are_means_over_the_steps_since(digits, tmp_path):
    keys = [*SAVING, "training.save_steps=4", "training.logging_steps=2"]
    whole = digits.train(tmp_path / "whole", "pretrain", *keys)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "pretrain", *keys, progress=stop_at(5))
    parts = digits.train(tmp_path / "parts", "pretrain", *keys, resume=True)
    assert digits.logged(parts) == digits.logged(whole)


def test_workers_do_not_change_a_run(digits, tmp_path):
    dropout = "student.mole.lora_dropout=0.3"
    workers = "training.dataloader_num_workers=1"
    first = digits.train(tmp_path / "none", "finetune", dropout)
    second = digits.train(tmp_path / "one", "finetune", dropout, workers)
    assert_same_weights(digits, tmp_path / "none", tmp_path / "one")
    assert digits.logged(first) == digits.logged(second)


def test_a_checkpoint_that_was_not_written_to_its_end_is_ignored(digits, tmp_path):
    keys = [*SAVING, "training.save_steps=1"]
    digits.train(tmp_path / "whole", "pretrain", *keys)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "pretrain", *keys, progress=stop_at(5))
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-4"
    (tmp_path / "parts/checkpoint-4/trainer_state.json").unlink()
    (tmp_path / "parts/checkpoint-3/trainer_state.json").write_text('{"cut')
    (tmp_path / "parts/checkpoint-9").mkdir()
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-2"
    digits.train(tmp_path / "parts", "pretrain", *keys, resume=True)
    assert_same_weights(digits, tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "distill"])
def test_accumulated_micro_batches_equal_one_batch(digits, tmp_path, stage):
    # The balance loss is taken a micro-batch, and AdamW divides rounding errors by themselves.
    keys = ["student.mole.balance_weight=0", "training.optim=sgd", "training.max_steps=3"]
    one = digits.train(tmp_path / "one", stage, *keys)
    halves = digits.train(
        tmp_path / "halves",
        stage,
        *keys,
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=2",
    )
    left, right = digits.weights(tmp_path / "one"), digits.weights(tmp_path / "halves")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-5)
    for first, second in zip(digits.logged(one), digits.logged(halves), strict=True):
        for name in ("loss", "loss_text", "loss_kd", "grad_norm"):
            if stage == "distill" and name == "loss_text":
                continue
            assert first[name] == pytest.approx(second[name], rel=1e-4)


@pytest.mark.parametrize("recipe", ["revised", "revised_2026_11"])
def test_pretrain_changes_experts_projector_and_heads_and_the_tower_by_recipe(
    digits, tmp_path, recipe
):
    keys = ["training.max_steps=3", *SAVING, "training.save_steps=3", f"recipe={recipe}"]
    digits.train(tmp_path, "pretrain", *keys)
    files = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert files == {
        "mole_encoder.safetensors",
        "mm_projector.safetensors",
        "encoder_adapter.safetensors",
        *(["vision_tower.safetensors"] if recipe == "revised" else []),
    }
    base = build_vlm(digits.config().student)
    trained = load_student(tmp_path).student
    kept = dict(base.vlm.named_parameters())
    changed = set()
    for name, parameter in trained.vlm.named_parameters():
        if not torch.equal(parameter, kept[name]):
            changed.add(part_of(name))
    assert changed == {"mole", "projector"} | ({"vision_tower"} if recipe == "revised" else set())
    stored = digits.weights(tmp_path)
    names = {name.split("/")[1] for name in stored if "encoder_adapter" in name}
    assert {name.split(".")[0] for name in names} == {"clip", "sam"}


def test_finetune_changes_every_part_and_goes_on_from_pretrain(digits, tmp_path):
    digits.train(tmp_path / "first", "pretrain", "training.max_steps=2")
    begin = f"init_from={tmp_path / 'first'}"
    still = digits.train(
        tmp_path / "still", "finetune", begin, "training.max_steps=1", "training.learning_rate=0"
    )
    first, second = digits.weights(tmp_path / "first"), digits.weights(tmp_path / "still")
    assert second.keys() > first.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert still.steps == 1
    digits.train(tmp_path / "moved", "finetune", begin, "training.max_steps=3")
    moved = digits.weights(tmp_path / "moved")
    files = {name.split("/")[0] for name in moved if not torch.equal(moved[name], second[name])}
    assert files == {
        "mole_encoder.safetensors",
        "mm_projector.safetensors",
        "encoder_adapter.safetensors",
        "vision_tower.safetensors",
        "language_model.safetensors",
    }


def test_a_stage_without_teachers_goes_on_from_one_with_them(digits, tmp_path):
    digits.train(tmp_path / "first", "pretrain", "training.max_steps=1")
    begin = f"init_from={tmp_path / 'first'}"
    keys = [begin, "distill=null", "training.max_steps=1"]
    summary = digits.train(tmp_path / "second", "finetune", *keys)
    assert "loss_kd" not in digits.logged(summary)[0]
    assert not (tmp_path / "second/model/encoder_adapter.safetensors").exists()


def test_text_only_batches_train_without_distillation(digits, tmp_path):
    entries = json.loads((digits.source / "finetune.json").read_text())
    text = [entry for entry in entries if "image" not in entry]
    (tmp_path / "text.json").write_text(json.dumps(text))
    set_seed(0)  # the run's
    before = build_vlm(digits.config().student).vlm.state_dict()
    summary = digits.train(
        tmp_path / "run",
        "finetune",
        f"data.conversations=[{tmp_path / 'text.json'}]",
    )
    steps = digits.logged(summary)
    assert all(step["loss_kd"] == 0 for step in steps)
    assert all(step["loss_balance"] == 0 for step in steps)  # nor by the blank image
    assert all(step["loss_text"] > 0 for step in steps)
    after = load_student(tmp_path / "run").student.vlm.state_dict()
    for name in after:
        same = torch.equal(before[name], after[name])
        if part_of(name) in ("vision_tower", "mole"):
            assert same, f"{name} moved without an image"
    assert any(
        not torch.equal(before[n], after[n]) for n in after if part_of(n) == "language_model"
    )


def test_a_loss_that_is_no_number_stops_and_names_the_samples(digits, tmp_path):
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step \d.*pretrain_000.*learning_rate"
    ):
        digits.train(tmp_path, "pretrain", "training.max_steps=5", learning_rate=1e38)


def test_a_run_needs_its_cache(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"no cache was given; add --cache"):
        train(digits.config(), tmp_path)


def test_geometry_must_be_the_caches(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"geometry 'crop'; the config asks for data.geometry"):
        digits.train(tmp_path, "pretrain", "data.geometry=pad")
    assert not (tmp_path / "config.yaml").exists()


def test_an_anyres_cache_teaches_the_base_view(digits, tmp_path):
    """Equal losses and weights to a base cache of the same geometry; one image a pass, so that
    the two builds' features are equal bits."""
    teachers = Path(scenes.__file__).parent / "teachers"
    specs = [load_spec(str(teachers / f"{name}.yaml")) for name in ("clip", "sam")]
    corpus, options = open_corpus(digits.data), BuildOptions(batch_size=1, num_workers=0)
    summaries = {}
    for views in ("base", "anyres"):
        build = build_cache(
            tmp_path / views,
            corpus,
            specs,
            geometry="stretch",
            views=views,
            options=options,
            channel_stats=None if views == "base" else tmp_path / "base",
        )
        assert all(s.status.rows == len(corpus) * (1 if views == "base" else 3) for s in build)
        part = replace(digits, cache=tmp_path / views)
        with pytest.raises(ConfigError, match=r"geometry 'stretch'; the config asks .* 'crop'"):
            part.train(tmp_path / "crop", "pretrain")
        overrides = ("data.geometry=stretch", "training.max_steps=3")
        summaries[views] = part.train(tmp_path / f"run-{views}", "pretrain", *overrides)
    base, anyres = (digits.logged(summary) for summary in summaries.values())
    assert base == anyres
    assert base[0]["loss_kd_sam"] > 0
    assert_same_weights(digits, tmp_path / "run-base", tmp_path / "run-anyres")


def test_a_teacher_that_is_not_there_is_named(digits, tmp_path):
    with pytest.raises(MovekdError, match="clap"):
        digits.train(tmp_path, "pretrain", "distill.teachers=[clip, clap]")


def test_an_incomplete_teacher_is_refused(digits, tmp_path):
    shutil.copytree(digits.cache, tmp_path / "cache")
    (tmp_path / "cache/sam.seals/00000.json").unlink()
    with pytest.raises(CacheError, match=r"'sam'.*lacks 1 Zarr shards.*movekd cache build"):
        train(digits.config(), tmp_path / "run", tmp_path / "cache")


def test_a_teacher_whose_sealed_files_are_gone_is_refused_before_the_first_step(digits, tmp_path):
    shutil.copytree(digits.cache, tmp_path / "cache")
    (tmp_path / "cache/sam.zarr/tokens/c/0/0/0").unlink()
    with pytest.raises(CacheError, match=r"'sam'.*tokens/c/0/0/0 is missing.*movekd cache build"):
        train(digits.config(), tmp_path / "run", tmp_path / "cache", allow_random_teachers=True)
    assert not (tmp_path / "run").exists()


def test_random_teachers_teach_nothing_unless_asked(digits, tmp_path, corpus_dir, cache_dir):
    keys = [
        f"data.shards={corpus_dir}",
        "data.conversations=[]",
        "distill.teachers=[clip]",
        "training.max_steps=1",
    ]
    config = digits.config("finetune", *keys)
    with pytest.raises(CacheError, match=r"'clip'.*random weights.*--allow-random-teachers"):
        train(config, tmp_path, cache_dir)
    assert train(config, tmp_path, cache_dir, allow_random_teachers=True).steps == 1


def test_a_corpus_that_the_cache_does_not_cover_is_refused(digits, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(digits.source / "images/test_00000.png", images / "new.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a 3"}]
    (tmp_path / "new.json").write_text(
        json.dumps([{"id": "n", "image": "new.png", "conversations": turns}])
    )
    pack_llava([tmp_path / "new.json"], images, tmp_path / "data", num_workers=1)
    config = digits.config(
        "pretrain", f"data.shards={tmp_path / 'data'}", f"data.conversations=[{tmp_path}/new.json]"
    )
    assert len(open_corpus(tmp_path / "data")) == 1
    with pytest.raises(UnknownKeyError, match=r"new\.png"):
        train(config, tmp_path / "run", digits.cache)
    assert "clip" in open_cache(digits.cache).teachers


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_became_another_is_a_sentence(digits, tmp_path, workers):
    data = tmp_path / "data"
    shutil.copytree(digits.data, data)
    for image in open_corpus(data).index.read().to_pylist():
        with (data / image["shard"]).open("r+b") as shard:
            shard.seek(image["offset"])
            shard.write(bytes(image["size"]))
    keys = [f"data.shards={data}", f"training.dataloader_num_workers={workers}"]
    with pytest.raises(MovekdError, match=r"^image [0-9a-f]{64} of .*replaced") as caught:
        digits.train(tmp_path / "run", "pretrain", *keys)
    assert "\n" not in str(caught.value)


def test_images_that_no_sample_has_room_for_are_found_before_the_first_step(digits):
    with pytest.raises(
        ConfigError, match=r"are 36 tokens, and data\.model_max_length is 20; raise"
    ):
        digits.parts(digits.config("pretrain", "data.model_max_length=20"))


def test_a_text_without_its_image_is_found_before_the_first_step(digits, tmp_path):
    entries = json.loads((digits.source / "finetune.json").read_text())
    entries[0]["conversations"][0]["value"] = "Is there a 3?"
    (tmp_path / "odd.json").write_text(json.dumps(entries))
    config = digits.config("finetune", f"data.conversations=[{tmp_path / 'odd.json'}]")
    with pytest.raises(ConfigError, match=r"has 0 <image> in its text and 1 images"):
        digits.parts(config)
