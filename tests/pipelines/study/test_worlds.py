"""Every world has its own split, and no test scenes before they are asked for."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

import scenes
from demo import TEACHERS
from study import worlds
from study.plan import FULL_SIZE, SMOKE, WORLDS
from study.worlds import (
    UNSEEN_LOOKS,
    World,
    collect_weights,
    write_more_tests,
    write_probe,
    write_scenes,
    write_test_scenes,
)


def test_worlds_split_the_handwriting_in_their_own_ways():
    for first, second in ((0, 1), (0, 2), (1, 2)):
        tested = [scenes.split_scans("test", number) for number in (first, second)]
        assert all(set(a) != set(b) for a, b in zip(*tested, strict=True))
    for number in range(3):
        used = [np.concatenate(scenes.split_scans(split, number)) for split in scenes.SHARES]
        assert sorted(np.concatenate(used)) == list(range(1797))


def test_no_test_scene_exists_before_the_final_pass(tmp_path):
    world = World(1, tmp_path, SMOKE)
    world.folder.mkdir()
    write_scenes(world)
    assert not list(tmp_path.rglob("*test*"))
    assert {path.stem for path in world.source.glob("*.json")} == {"pretrain", "finetune", "val"}
    folder = write_test_scenes(world)
    assert [path.name for path in folder.glob("*.json")] == ["test.json"]
    before = (folder / "test.json").stat().st_mtime_ns
    assert write_test_scenes(world) == folder
    assert (folder / "test.json").stat().st_mtime_ns == before


def test_a_world_of_other_sizes_is_refused_and_one_of_these_is_kept(tmp_path):
    world = World(1, tmp_path, SMOKE)
    world.folder.mkdir()
    write_scenes(world)
    kept = (world.source / "val.json").stat().st_mtime_ns
    write_scenes(world)
    assert (world.source / "val.json").stat().st_mtime_ns == kept
    stamp = world.folder / "scenes.json"
    stamp.write_text(json.dumps({"sizes": [1, 2, 3]}))
    with pytest.raises(SystemExit, match="was made with other sizes; delete it"):
        write_scenes(world)


def test_ground_truth_is_drawn_again_as_it_was_written(tmp_path):
    scenes.write_corpus(tmp_path, 0, 0, 300, 0, seed=2, split_seed=2)
    parts = list(scenes.draw_part("val", 300, seed=2, split_seed=2))
    assert [len(batch) for batch, _ in parts] == [256, 44]
    entries = json.loads((tmp_path / "val.json").read_text())
    questions = [asked for _, part in parts for asked in part]
    for entry, asked in zip(entries, questions, strict=True):
        kind, question, answer = asked[0]
        assert entry["question_type"] == kind
        assert entry["conversations"][0]["value"].endswith(question)
        assert entry["conversations"][1]["value"] == answer


@pytest.mark.parametrize("number", WORLDS)
def test_worlds_take_the_weights_that_ship(tmp_path, number):
    world = World(number, tmp_path, FULL_SIZE)
    assert world.shipped_weights is not None
    collect_weights(world)
    assert set(json.loads((world.folder / "weights/training.json").read_text())) >= set(TEACHERS)
    sums = (world.folder / "weights/SHA256SUMS").read_text()
    assert sums == (world.shipped_weights / "SHA256SUMS").read_text()
    for line in sums.splitlines():
        digest, name = line.split()
        found = hashlib.sha256((world.folder / "weights" / name).read_bytes()).hexdigest()
        assert found == digest, name


def test_teachers_trained_at_full_size_are_kept_to_be_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "WEIGHTS", tmp_path / "teachers")
    trained = World(1, tmp_path / "work", FULL_SIZE)
    assert trained.shipped_weights is None
    for name in TEACHERS:
        part = trained.folder / "training" / name
        (part / name).mkdir(parents=True)
        (part / name / "model.safetensors").write_text(f"weights of {name}")
        (part / "training.json").write_text(json.dumps({name: {"seconds": 1}}))
    collect_weights(trained)
    assert not (trained.folder / "training").exists()
    kept = tmp_path / "teachers/world1"
    assert {path.name for path in kept.iterdir()} == {*TEACHERS, "training.json", "SHA256SUMS"}
    elsewhere = World(1, tmp_path / "elsewhere", FULL_SIZE)
    assert elsewhere.shipped_weights == kept
    collect_weights(elsewhere)
    for file in sorted(p for p in (trained.folder / "weights").rglob("*") if p.is_file()):
        other = elsewhere.folder / "weights" / file.relative_to(trained.folder / "weights")
        assert other.read_bytes() == file.read_bytes()

    tiny = World(1, tmp_path / "tiny", SMOKE)
    (tiny.folder / "training").mkdir(parents=True)
    collect_weights(tiny)
    assert [path.name for path in (tmp_path / "teachers").iterdir()] == ["world1"]


def test_worlds_of_other_sizes_train_their_own(tmp_path):
    assert World(1, tmp_path, SMOKE).shipped_weights is None


def test_unseen_looks_change_what_is_beside_the_digits_only(tmp_path):
    world = World(3, tmp_path, SMOKE)
    world.folder.mkdir()
    write_more_tests(world)
    plain = write_test_scenes(world)
    asked = (plain / "test.json").read_bytes()
    images = {"plain": plain / "images"}
    for look in UNSEEN_LOOKS:
        folder = write_test_scenes(world, look)
        assert (folder / "test.json").read_bytes() == asked
        images[look] = folder / "images"
    pixels = {
        look: np.stack([np.asarray(Image.open(p)) / 255 for p in sorted(folder.glob("*.png"))])
        for look, folder in images.items()
    }
    assert len({array.shape for array in pixels.values()}) == 1
    rough = {n: np.abs(np.diff(a, axis=2)).mean() for n, a in pixels.items()}
    assert rough["noise"] > 2 * rough["plain"]
    assert pixels["clutter"].mean() > pixels["plain"].mean()


def test_a_probe_shows_one_digit_in_unseen_handwriting(tmp_path, monkeypatch):
    shown = []
    compose = scenes.compose

    def watched(digits_BC, split, rng, split_seed, *look):
        drawn = compose(digits_BC, split, rng, split_seed, *look)
        shown.append((split, split_seed, drawn))
        return drawn

    monkeypatch.setattr(scenes, "compose", watched)
    world = World(4, tmp_path, SMOKE)
    world.folder.mkdir()
    folder = write_probe(world)
    assert [(split, seed) for split, seed, _ in shown] == [("train", 4), ("test", 4)]
    for split, _, drawn in shown:
        allowed = np.concatenate(scenes.split_scans(split, 4))
        assert ((drawn.digits_BC != scenes.EMPTY).sum(1) == 1).all()
        assert np.isin(drawn.scans_BC.max(1), allowed).all()
        digits = drawn.digits_BC.max(1)
        for i, digit in enumerate(digits):
            saved = np.asarray(Image.open(folder / split / str(digit) / f"{i:05d}.png"))
            assert (saved[..., 0] == drawn.images_BHW[i]).all()
        assert len(list(folder.glob(f"{split}/*/*.png"))) == world.sizes.num_probe
    assert write_probe(world) == folder
    assert len(shown) == 2  # kept
