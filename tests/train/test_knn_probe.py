"""Tests of movekd.train.knn_probe: kNN on labelled images during a run."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import scenes
from movekd.errors import ConfigError, CorpusError
from movekd.evaluate.encoder.encoders import load_encoder
from movekd.evaluate.encoder.features import BLOCK_IMAGES
from movekd.evaluate.encoder.labelled_images import read_labelled_images
from movekd.evaluate.encoder.run import run_probe
from movekd.train.knn_probe import join_shares, share_positions
from movekd.view.plots import run_figures
from movekd.view.run_log import read_run
from torchrun import train_in_two_processes

KNN = ("eval_knn_cls_accuracy", "eval_knn_patches_accuracy")
PARTS = {"train": 40, "test": 8}


def _quiet(what, done, total):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes of two and of four digits, and a file that is no image."""
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for split, count in PARTS.items():
        for name, num_empty in (("two", 2), ("four", 0)):
            digits_BC = rng.integers(0, 10, (count, 4))
            digits_BC[:, :num_empty] = scenes.EMPTY
            (root / split / name).mkdir(parents=True)
            drawn = scenes.compose(digits_BC, "train", rng)
            for number, image_HW in enumerate(drawn.images_BHW):
                Image.fromarray(image_HW).save(root / split / name / f"{number:03}.png")
    (root / "test" / "two" / "broken.png").write_bytes(b"no image")
    return root


def probed(log):
    """Return the probe's figures of each evaluation, without its seconds."""
    return [{n: e[n] for n in ("step", *KNN)} for e in log if KNN[0] in e]


def keys(folder, *more):
    return (f"data.probe_images={folder}", "training.eval_steps=2", *more)


@pytest.fixture(scope="module")
def run(digits, folder, tmp_path_factory):
    """Stage distill, whose tower learns fast, without a held-out sample."""
    output, lines = tmp_path_factory.mktemp("probed") / "run", []
    summary = digits.train(output, "distill", *keys(folder, *FAST), notify=lines.append)
    return output, summary, lines


FAST = (
    "training.max_steps=5",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.save_total_limit=null",
    "training.learning_rate=0.01",
    "training.report_to=tensorboard",
    "student.mole.lora_dropout=0.3",
)


def test_the_log_has_what_movekd_probe_finds_of_the_saved_run(run, folder):
    output, summary, lines = run
    found = probed(summary.log)
    assert [entry["step"] for entry in found] == [2, 4, 5]  # the last step in any case
    assert probed(json.loads((output / "log.json").read_text())) == found
    assert not any("eval_loss" in entry for entry in summary.log)
    scores = run_probe(
        ["run"],
        lambda _: load_encoder(str(output)),
        read_labelled_images(folder, _quiet),
        features=None,
        progress=_quiet,
        linear=False,
    )
    assert {f"eval_knn_{s.feature}_accuracy": s.accuracy for s in scores} == {
        name: found[-1][name] for name in KNN
    }
    (line,) = lines
    assert line.startswith(
        "data.probe_images: kNN on 16 images of 2 classes, by 80 labelled ones; 1 of 97 files "
        "are not used: test/two/broken.png: "
    )


def test_curves_and_the_report_show_it(run, tmp_path):
    output, summary, _ = run
    (curves,) = {path.parent for path in output.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(curves))
    events.Reload()
    for name in KNN:
        scalars = events.Scalars(name.replace("eval_", "eval/", 1))
        assert [event.step for event in scalars] == [2, 4, 5]
    log = read_run(output)
    assert log.series(KNN[1])[1] == [entry[KNN[1]] for entry in probed(summary.log)]
    assert "kNN accuracy of the encoder" in dict(run_figures(log))
    assert log.left_out == []


def test_a_probe_changes_no_weight_and_no_loss_also_after_a_resume(digits, run, folder, tmp_path):
    output, summary, _ = run
    without = digits.train(tmp_path / "without", "distill", *FAST)

    def progress(what, done, total):
        if what.startswith("train") and done == 3:
            raise KeyboardInterrupt

    mine = keys(shutil.copytree(folder, tmp_path / "labelled"), *FAST)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "distill", *mine, progress=progress)
    parts = digits.train(tmp_path / "parts", "distill", *mine, resume=True)
    assert probed(parts.log) == probed(summary.log)
    assert digits.logged(without) == digits.logged(summary)
    assert digits.logged(parts) == digits.logged(summary)
    one = digits.weights(output)
    for other in (digits.weights(tmp_path / "without"), digits.weights(tmp_path / "parts")):
        assert one.keys() == other.keys()
        assert not [name for name in one if not torch.equal(one[name], other[name])]
    with pytest.raises(ConfigError, match=r"another config: data\.probe_images differ"):
        digits.train(tmp_path / "parts", "distill", *FAST, resume=True)
    (tmp_path / "labelled" / "test" / "two" / "000.png").unlink()
    with pytest.raises(ConfigError, match="begun with other data: probe images differ"):
        digits.train(tmp_path / "parts", "distill", *mine, resume=True)


def test_held_out_losses_stand_beside_it(digits, folder, tmp_path):
    both = ("data.val_size=5", "training.max_steps=2", "training.eval_on_start=true")
    summary = digits.train(tmp_path, "finetune", *keys(folder, *both))
    found = [entry for entry in summary.log if KNN[0] in entry]
    assert [entry["step"] for entry in found] == [0, 2]
    assert all("eval_loss_text" in entry for entry in found)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_the_ranks_share_whole_blocks_and_find_every_image_once(num_ranks):
    num_images = 3 * BLOCK_IMAGES + 7
    rows = np.arange(num_images, dtype=np.float32)[:, None]
    shares = [share_positions(num_images, rank, num_ranks) for rank in range(num_ranks)]
    found = [{"patches": rows[share]} if len(share) else {} for share in shares]
    for share in shares:
        blocks = np.split(share, np.flatnonzero(np.diff(share) > 1) + 1)
        assert all(len(block) % BLOCK_IMAGES in (0, 7) for block in blocks)
    joined = join_shares(list(zip(shares, found, strict=True)))
    assert np.array_equal(joined["patches"], rows)


@pytest.mark.slow
def test_two_processes_find_the_same_as_one(digits, folder, tmp_path):
    more = keys(folder, "training.max_steps=2", "training.learning_rate=0")
    single = digits.train(tmp_path / "one", "distill", *more)
    half = digits.config("distill", *more, "training.per_device_train_batch_size=2")
    train_in_two_processes(half, tmp_path / "two", digits.cache)
    log = json.loads((tmp_path / "two" / "log.json").read_text())
    assert probed(log) == probed(single.log)


def test_a_bad_folder_is_a_sentence_before_anything_loads(digits, folder, tmp_path):
    missing = "student.vision_tower=/nowhere"  # would be the first to fail
    flat = tmp_path / "flat"
    flat.mkdir()
    for given, said in [
        (tmp_path / "no", "is no folder"),
        (flat, "holds no image of train that can"),
    ]:
        with pytest.raises(CorpusError, match=said):
            digits.train(tmp_path / "run", "distill", *keys(given, missing))
    few = tmp_path / "few"
    for split in PARTS:
        for name in ("two", "four"):
            (few / split / name).mkdir(parents=True)
            for number in range(2):
                source = folder / split / name / f"{number:03}.png"
                (few / split / name / source.name).write_bytes(source.read_bytes())
    with pytest.raises(ConfigError, match=r"train part holds 4 images .* expected 20 or more"):
        digits.train(tmp_path / "run", "distill", *keys(few, missing))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), r"data\.probe_images is given, but nothing says when.*eval_steps"),
        (("training.eval_steps=2", "training.load_best_model_at_end=true"), r"load_best_model_at"),
        (
            ("training.eval_steps=2", "training.metric_for_best_model=loss"),
            r"gives accuracies only",
        ),
        (("training.eval_steps=2", "training.save_strategy=best"), r"save_strategy is best, which"),
        (
            ("training.eval_steps=2", "training.lr_scheduler_type=reduce_lr_on_plateau"),
            r"lr_scheduler_type is reduce_lr_on_plateau, which needs the loss of held-out",
        ),
    ],
)
def test_what_needs_a_held_out_loss_is_refused(digits, folder, more, said):
    with pytest.raises(ConfigError, match=said):
        digits.config("distill", f"data.probe_images={folder}", *more)
