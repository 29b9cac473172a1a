"""Every world has its own split and no test scenes; the shuffled cache is a valid cache."""

import hashlib
import json

import numpy as np
import pytest

import scenes
from demo import TEACHERS
from movekd.cache import open_cache
from movekd.cache.verify import verify
from study.plan import FULL_SIZE, SMOKE, WORLDS
from study.worlds import World, collect_weights, shuffle_cache, write_scenes, write_test_scenes


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


def test_worlds_of_other_sizes_train_their_own(tmp_path):
    assert World(1, tmp_path, SMOKE).shipped_weights is None


def test_every_image_of_a_shuffled_cache_has_the_features_of_another(cache_dir, tmp_path):
    shuffle_cache(cache_dir, tmp_path / "shuffled", seed=1)
    assert list(verify(tmp_path / "shuffled")) == []
    source, shuffled = open_cache(cache_dir), open_cache(tmp_path / "shuffled")
    assert shuffled.teachers == source.teachers
    rows = np.arange(len(source.keys))
    orders = []
    for teacher in source.teachers:
        before, after = source[teacher].read(rows).stored, shuffled[teacher].read(rows).stored
        flat = {n: a.numpy().reshape(len(rows), -1) for n, a in before.items()}
        order = [
            next(r for r in rows if (flat["tokens"][r] == row.numpy().reshape(-1)).all())
            for row in after["tokens"]
        ]
        assert sorted(order) == rows.tolist()
        assert all(order != rows)
        for name, array in after.items():  # all arrays of a row move together
            np.testing.assert_array_equal(array.numpy().reshape(len(rows), -1), flat[name][order])
        assert (shuffled[teacher].stats.mean_D == source[teacher].stats.mean_D).all()
        orders.append(order)
    assert orders[0] == orders[1]  # and all teachers of an image
    shuffle_cache(cache_dir, tmp_path / "shuffled", seed=2)  # there already: kept
    shuffle_cache(cache_dir, tmp_path / "other", seed=2)
    first = shuffled[source.teachers[0]].read(rows).stored["tokens"]
    assert (open_cache(tmp_path / "shuffled")["clip"].read(rows).stored["tokens"] == first).all()
    assert (open_cache(tmp_path / "other")["clip"].read(rows).stored["tokens"] != first).any()
