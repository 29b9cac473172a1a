"""Tests of movekd.train.run_dir: what is deleted, what is gone on with, and what is not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scenes
from movekd.cache.spec import load_spec
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.train.fingerprints import require_same_inputs
from movekd.train.run_dir import RunStart, plan_start, write_run_files

SAVING = ("training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=null")


def interrupted(digits, output, *keys):
    """Train until step 4 of 6, with a checkpoint of steps 2 and 4."""

    def progress(what, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits.train(output, "pretrain", *SAVING, *keys, progress=progress)


def test_an_earlier_run_is_neither_lost_nor_mixed_up(digits, tmp_path):
    digits.train(tmp_path, "pretrain", "training.max_steps=1")
    before = digits.weights(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a run already; give --resume.*--overwrite"):
        digits.train(tmp_path, "pretrain", "training.max_steps=1")
    with pytest.raises(
        ConfigError, match=r"another config: distill\.kd_weight, training\.max_steps differ"
    ):
        digits.train(
            tmp_path, "pretrain", "training.max_steps=2", "distill.kd_weight=1", resume=True
        )
    after = digits.weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    summary = digits.train(tmp_path, "pretrain", "training.max_steps=2", overwrite=True)
    assert summary.steps == 2


def test_overwrite_leaves_alone_what_is_no_run(digits, tmp_path):
    thesis = tmp_path / "precious/thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years")
    with pytest.raises(ConfigError, match=r"holds files but no config\.yaml.*does not delete it"):
        digits.train(thesis.parent, "pretrain", overwrite=True)
    digits.train(tmp_path / "run", "pretrain", "training.max_steps=1")
    (tmp_path / "run/notes.txt").write_text("mine")
    digits.train(tmp_path / "run", "pretrain", "training.max_steps=1", overwrite=True)
    assert thesis.read_text() == "years"
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_overwrite_spares_what_the_run_starts_from(digits, tmp_path):
    digits.train(tmp_path / "run", "pretrain", "training.max_steps=1")
    before = digits.weights(tmp_path / "run")
    begin = f"init_from={tmp_path / 'run'}"
    with pytest.raises(ConfigError, match=r"would delete .* and init_from .* lies there"):
        digits.train(tmp_path / "run", "finetune", begin, overwrite=True)
    after = digits.weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_parts_of_the_stage_before_are_saved_even_if_it_is_deleted_meanwhile(digits, tmp_path):
    digits.train(tmp_path / "first", "finetune", "training.max_steps=1")

    def progress(what, done, total):
        shutil.rmtree(tmp_path / "first", ignore_errors=True)

    keys = [f"init_from={tmp_path / 'first'}", "trained=[projector]", "training.max_steps=1"]
    digits.train(tmp_path / "second", "finetune", *keys, progress=progress)
    saved = {path.name for path in (tmp_path / "second/model").glob("*.safetensors")}
    assert {"mole_encoder.safetensors", "language_model.safetensors"} < saved


def test_workers_and_the_division_of_a_batch_may_change_at_a_resume(digits, tmp_path):
    whole = digits.train(tmp_path / "whole", "pretrain", *SAVING)
    for name, keys in (
        ("workers", ["training.dataloader_num_workers=1"]),
        (
            "halves",
            [
                "training.per_device_train_batch_size=2",
                "training.gradient_accumulation_steps=2",
            ],
        ),
    ):
        interrupted(digits, tmp_path / name)
        resumed = digits.train(tmp_path / name, "pretrain", *SAVING, *keys, resume=True)
        for one, other in zip(digits.logged(whole), digits.logged(resumed), strict=True):
            assert other["loss_text"] == pytest.approx(one["loss_text"], rel=1e-4)
        expected, found = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / name)
        for tensor in expected:
            atol = 0 if name == "workers" else 1e-3
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=atol)


def test_another_batch_size_is_refused_at_a_resume(digits, tmp_path):
    interrupted(digits, tmp_path)
    with pytest.raises(ConfigError, match=r"begun with 4 samples per step, and this is 2 "):
        digits.train(
            tmp_path, "pretrain", *SAVING, "training.per_device_train_batch_size=2", resume=True
        )


def test_what_torchrun_starts_again_goes_on_by_itself_and_deletes_nothing(
    digits, tmp_path, monkeypatch
):
    digits.train(tmp_path / "whole", "pretrain", *SAVING)
    interrupted(digits, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    seen = []
    digits.train(
        tmp_path / "run",
        "pretrain",
        *SAVING,
        overwrite=True,
        progress=lambda what, done, total: seen.append(done),
    )
    assert seen == [5, 6]
    expected, found = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_restart_is_of_the_run_that_this_start_of_torchrun_has_begun(digits, tmp_path):
    """Not of one that lay there before: that one is refused again, or overwritten if asked."""
    config = digits.config()
    started = {"resume": False, "overwrite": False}
    write_run_files(tmp_path, config, {"global_batch_size": 4}, ["a:1", "b:1"])
    for launches in (["a:1"], ["c:1", "b:1"], ["b:1", None]):  # nodes have gone and come
        start = plan_start(config, tmp_path, launches, resume=False, overwrite=True)
        assert start == RunStart(None, 4, False)
    for launches in (["a:2", "b:2"], []):
        with pytest.raises(ConfigError, match="holds a run already"):
            plan_start(config, tmp_path, launches, **started)
        start = plan_start(config, tmp_path, launches, resume=False, overwrite=True)
        assert start.is_overwriting
    write_run_files(
        tmp_path, config, {"global_batch_size": 4}, ["c:1", "b:1"]
    )  # a has gone, b next
    assert not plan_start(config, tmp_path, ["c:1"], **started).is_overwriting


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"resume": True, "overwrite": False, "force": True}, "only belongs to --overwrite"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(digits, tmp_path, flags, words):
    with pytest.raises(ConfigError, match=words):
        plan_start(digits.config(), tmp_path, **flags)


def test_samples_per_step_stay_unless_the_config_divides_them_anew(digits, tmp_path):
    write_run_files(tmp_path, digits.config(), {"global_batch_size": 24})
    for keys, samples in (
        ((), 24),
        (("training.dataloader_num_workers=1",), 24),
        (("training.per_device_train_batch_size=6",), None),
        (("training.gradient_accumulation_steps=6",), None),
    ):
        config = digits.config("pretrain", *keys)
        assert plan_start(config, tmp_path, resume=True, overwrite=False).samples == samples


def test_processes_that_read_other_data_are_refused():
    inputs = {"corpus": "1", "global_batch_size": 4}
    require_same_inputs([inputs, dict(inputs)])
    with pytest.raises(
        ConfigError, match=r"process 2 reads other data.*: corpus differ\. Give every"
    ):
        require_same_inputs([inputs, inputs, inputs | {"corpus": "2"}])


def test_another_cache_is_refused_at_a_resume(digits, tmp_path):
    interrupted(digits, tmp_path / "run")
    corpus = open_corpus(digits.data)
    specs = [
        load_spec(str(path)).with_changes(codec="float16")
        for path in sorted((Path(scenes.__file__).parent / "teachers").glob("*.yaml"))
        if path.stem in ("clip", "sam")
    ]
    list(
        build_cache(
            tmp_path / "cache", corpus, specs, geometry="crop", options=BuildOptions(num_workers=0)
        )
    )
    other = replace(digits, cache=tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"begun with other data: features of clip, features of sam differ"
    ):
        other.train(tmp_path / "run", "pretrain", *SAVING, resume=True)
    # the same features elsewhere are the same
    shutil.copytree(digits.cache, tmp_path / "moved")
    replace(digits, cache=tmp_path / "moved").train(
        tmp_path / "run", "pretrain", *SAVING, resume=True
    )
    noted = json.loads((tmp_path / "run/inputs.json").read_text())
    assert noted["global_batch_size"] == 4


def test_a_run_that_is_older_than_a_key_is_resumed(digits, tmp_path):
    """`anchor_share` was 0.8 in every run that was begun before it became a key."""
    interrupted(digits, tmp_path, "recipe=official")
    path = tmp_path / "config.yaml"
    old = path.read_text()
    assert "  anchor_share: 0.8\n" in old
    path.write_text(old.replace("  anchor_share: 0.8\n", ""))
    with pytest.raises(ConfigError, match=r"another config: distill\.anchor_share differ"):
        digits.train(
            tmp_path,
            "pretrain",
            *SAVING,
            "recipe=official",
            "distill.anchor_share=0.5",
            resume=True,
        )
    assert digits.train(tmp_path, "pretrain", *SAVING, "recipe=official", resume=True).steps == 6


def test_a_run_with_another_order_of_samples_is_not_resumed(digits, tmp_path):
    keys = (*SAVING, "training.max_steps=4")
    digits.train(tmp_path, "finetune", *keys)
    path = tmp_path / "inputs.json"
    noted = json.loads(path.read_text())
    assert noted.pop("order")
    path.write_text(json.dumps(noted))
    with pytest.raises(ConfigError, match=r"another order of samples .*twice and others never"):
        digits.train(tmp_path, "finetune", *keys, resume=True)
