"""The caches of control arms are valid caches, and hold other images' features or the labels."""

import numpy as np
import pytest
import torch

import pretrain
import scenes
from movekd.cache import open_cache
from movekd.cache.grid import resize_tokens
from movekd.cache.verify import verify
from study.controls import digit_labels, label_cache, rotation, shuffle_cache
from study.plan import SHIPPED_CACHE, SMOKE
from study.worlds import World, build, collect_weights, write_scenes

COUNTS: dict[scenes.Part, int] = {
    "pretrain": SMOKE.num_pretrain,
    "finetune": SMOKE.num_finetune,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """World 0 at tiny sizes with the shipped cache and that of labels."""
    made = World(0, tmp_path_factory.mktemp("controls"), SMOKE)
    collect_weights(made)
    write_scenes(made)
    for name in (SHIPPED_CACHE, "labels"):
        build(made, name)
    return made


def test_dense_teachers_say_the_labels_of_each_image(world):
    assert list(verify(world.cache("labels"))) == []
    source, labels = open_cache(world.cache(SHIPPED_CACHE)), open_cache(world.cache("labels"))
    assert labels.teachers == source.teachers
    for part, count in COUNTS.items():
        (batch, _), *more = scenes.draw_part(part, count, 0, 0)
        assert not more
        rows = labels.rows([f"{part}_{i:05d}.png" for i in range(count)])
        wanted = {
            "eva": resize_tokens(digit_labels(batch, 8), 6),
            "convnext": digit_labels(batch, 6),
            "sam": resize_tokens(pretrain.stroke_labels(batch, 12), 6),
        }
        for teacher, labels_BNC in wanted.items():
            store = labels[teacher]
            back_CD = rotation(labels_BNC.shape[-1], store.layout.width, 0)
            found_BNC = store.read(rows).tokens_BND @ back_CD.T
            assert (found_BNC - labels_BNC).abs().max() < 0.05  # int8
            assert (found_BNC - labels_BNC).square().mean() < 1e-4 * labels_BNC.square().mean()
    digits = labels["convnext"].read(labels.rows(["pretrain_00000.png"])).tokens_BND
    assert digits.std() > 0


def test_the_teacher_without_dense_labels_keeps_every_byte(world):
    source, labels = open_cache(world.cache(SHIPPED_CACHE)), open_cache(world.cache("labels"))
    rows = np.arange(len(source.keys))
    before, after = (cache["clip"].read(rows).stored for cache in (source, labels))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert torch.equal(array, after[name])
    sizes = [[cache[t].layout.row_bytes for t in cache.teachers] for cache in (source, labels)]
    assert sizes[0] == sizes[1]
    assert labels["eva"].spec == source["eva"].spec


def test_a_rotation_keeps_distances():
    turn_CD = rotation(11, 96, seed=3)
    assert torch.allclose(turn_CD @ turn_CD.T, torch.eye(11), atol=1e-5)
    assert not torch.equal(turn_CD, rotation(11, 96, seed=4))


def test_stroke_labels_are_the_pixels_of_each_token():
    ((batch, _),) = scenes.draw_part("val", 2, 0, 0)
    labels_BNC = pretrain.stroke_labels(batch, 12).reshape(2, 12, 12, 2, 4, 4)
    whole = labels_BNC.permute(3, 0, 1, 4, 2, 5).reshape(2, 2, 48, 48)
    stroke, edge = whole
    assert torch.equal(stroke, (torch.from_numpy(batch.ink_BHW) > 0.35).float())
    assert not (stroke * edge).any()
    assert edge.sum() > 0


def test_an_interrupted_control_is_made_again_and_a_whole_one_kept(world, tmp_path):
    source = world.cache(SHIPPED_CACHE)
    whole = world.cache("labels")
    stamp = (whole / "control.json").stat().st_mtime_ns
    build(world, "labels")
    assert (whole / "control.json").stat().st_mtime_ns == stamp
    cut = tmp_path / "cut"
    label_cache(source, cut, COUNTS, seed=0)
    (cut / "control.json").unlink()
    (cut / "eva.zarr" / "zarr.json").write_text("{}")
    label_cache(source, cut, COUNTS, seed=0)
    assert list(verify(cut)) == []
    for file in sorted(path for path in whole.rglob("*") if path.is_file()):
        assert (cut / file.relative_to(whole)).read_bytes() == file.read_bytes(), file.name


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
