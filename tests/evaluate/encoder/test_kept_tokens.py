"""Kept tokens: the same scores with and without a folder, and nothing computed twice."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from movekd.cache.reader import open_cache
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError
from movekd.evaluate.encoder.cached_teacher import CachedTeacher
from movekd.evaluate.encoder.dense import run_dense_probe
from movekd.evaluate.encoder.encoders import load_encoder
from movekd.evaluate.encoder.features import encode_images, require_features_folder
from movekd.evaluate.encoder.kept_tokens import keeping
from movekd.evaluate.encoder.label_maps import read_mapped_images
from movekd.evaluate.encoder.teacher_fit import TeacherFits, choose_fit_images


class Interrupted(Exception):
    """What a killed probe ends with."""


class Counted:
    """A model that counts its batches, and can end the probe after some of them."""

    def __init__(self, model, most=10_000) -> None:
        self.identity, self.geometry = model.identity, model.geometry
        self.num_batches, self._model, self._most = 0, model, most

    def encode(self, keys, contents):
        if self.num_batches == self._most:
            raise Interrupted
        self.num_batches += 1
        return self._model.encode(keys, contents)


@pytest.fixture(scope="module")
def student(run):
    return load_encoder(str(run))


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """Images in two colours, and which half has which; 70 of train are two batches."""
    root, rng = tmp_path_factory.mktemp("halves"), np.random.default_rng(0)
    for split, count in {"train": 70, "test": 10}.items():
        for at in range(count):
            labels = np.zeros((32, 32), np.uint8)
            labels[:, : rng.integers(8, 24)] = 1
            noise = rng.integers(0, 80, (32, 32, 3))
            colours = (noise + labels[..., None] * 150).astype(np.uint8)
            for kind, picture in (("images", colours), ("maps", labels)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / kind / split / f"{at:03}.png")
    return read_mapped_images(root / "images", root / "maps", lambda *_: None)


def dense(model, mapped, quiet, folder):
    return run_dense_probe(["a"], lambda _: model, mapped, features=folder, progress=quiet)


def test_a_dense_probe_interrupted_and_run_again_equals_an_undisturbed_one(
    student, mapped, quiet, tmp_path
):
    expected = dense(student, mapped, quiet, None)
    killed, again, third = Counted(student, most=1), Counted(student), Counted(student, most=0)
    with pytest.raises(Interrupted):
        dense(killed, mapped, quiet, tmp_path)
    assert dense(again, mapped, quiet, tmp_path) == expected
    assert (killed.num_batches, again.num_batches) == (1, 2)  # train has two batches, test one
    unreadable = dataclasses.replace(mapped, read=lambda name: pytest.fail(f"{name} is read"))
    assert dense(third, unreadable, quiet, tmp_path) == expected
    require_features_folder(tmp_path)  # all files are the probe's own


def test_a_fit_with_kept_tokens_equals_one_without(student, cached, quiet, tmp_path):
    corpus, cache = open_corpus(cached.shards), open_cache(cached.cache)
    chosen = choose_fit_images(
        cache,
        corpus.index["key"].combine_chunks(),
        lambda some: map(corpus.read_image, corpus.rows(some).tolist()),
        60,
    )
    scores = []
    for model, folder in (
        (student, None),
        (Counted(student), tmp_path),
        (Counted(student, most=0), tmp_path),
    ):
        fits = TeacherFits(chosen, quiet, folder)
        fits.measure("student", model)
        scores.append(fits.scores)
    assert scores[0] == scores[1] == scores[2]


def test_tokens_and_pooled_features_of_the_same_images_lie_side_by_side(student, tmp_path, mapped):
    images = mapped.test[:3]
    keys, contents = [i.sha256 for i in images], [mapped.read(i.name) for i in images]
    model = keeping(student, tmp_path)
    first = model.encode(keys, iter(contents))
    kept = model.encode(keys, iter(()))
    assert torch.equal(kept.tokens_BND, first.tokens_BND.cpu())
    assert torch.equal(kept.cls_BD, first.cls_BD.cpu())
    pooled = encode_images(student, images, mapped.read, tmp_path, lambda *_: None)
    assert np.allclose(pooled["patches"], first.tokens_BND.mean(1).cpu(), atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 2
    other = model.encode(keys[:2], iter(contents[:2]))  # another batch is another file
    assert len(other.tokens_BND) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"is damaged.*Delete it"):
        model.encode(keys, iter(contents))


def test_a_teacher_in_a_cache_is_not_kept_again(cached, tmp_path):
    teacher = CachedTeacher(open_cache(cached.cache), "clip")
    assert keeping(teacher, tmp_path) is teacher
    assert keeping(teacher, None) is teacher
