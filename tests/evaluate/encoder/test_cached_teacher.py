"""Teachers of a cache are probed without their weights, on the images that it holds."""

import shutil

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from builds import build
from movekd.cache.reader import open_cache
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, ConfigError, CorpusError
from movekd.evaluate.encoder.cached_teacher import CachedTeacher, open_cached_teacher
from movekd.evaluate.encoder.features import encode_images
from movekd.evaluate.encoder.run import run_probe


def _without(images, teacher):
    return images.without(teacher.missing([i.sha256 for i in (*images.train, *images.test)]))


def test_images_are_found_by_their_content_and_others_are_counted(cached, images):
    teacher = open_cached_teacher(f"cache:{cached.cache}#clip")
    left = _without(images, teacher)
    assert len(left.train) + len(left.test) == 95
    assert left.num_found == 101 == 95 + len(left.skipped)
    said = [why for why in left.skipped.values() if why == f"{cached.cache} does not hold it"]
    assert len(said) == 5


def test_features_are_the_stored_ones_and_no_image_is_read(cached, images, quiet):
    cache = open_cache(cached.cache)
    left = _without(images, CachedTeacher(cache, "clip"))

    def read(name):
        raise AssertionError(name)

    found = encode_images(CachedTeacher(cache, "clip"), left.test, read, None, quiet)
    corpus = open_corpus(cached.shards)
    stored = cache["clip"].read(corpus.rows([i.sha256 for i in left.test]))
    np.testing.assert_array_equal(found["cls"], stored.cls_BD)
    np.testing.assert_array_equal(found["patches"], stored.tokens_BND.mean(1))
    conv = encode_images(CachedTeacher(cache, "conv"), left.test, read, None, quiet)
    assert list(conv) == ["patches"]


def test_images_that_are_not_built_or_were_skipped_have_their_reasons(
    small_shards, tmp_path, damaged_corpus, tiny_specs
):
    data, position = damaged_corpus
    build(tmp_path / "cache", data, tiny_specs[1:], partition=None)
    key = open_corpus(data).key(position)
    cache = open_cache(tmp_path / "cache")
    seals = sorted((tmp_path / "cache" / "conv.seals").glob("0*.json"))
    seals[-1].unlink()
    keys = open_corpus(data).index["key"].to_pylist()
    missing = CachedTeacher(open_cache(tmp_path / "cache"), "conv").missing([*keys, "0" * 64])
    unbuilt = [why for why in missing.values() if why.endswith("#conv is not built that far")]
    assert len(unbuilt) == 8
    assert "has no features of it: " in missing[key]
    assert missing["0" * 64] == f"{cache.url} does not hold it"
    assert len(missing) == 10


def test_a_name_that_is_wrong_is_refused(cached, images, tmp_path, tiny_specs):
    with pytest.raises(ConfigError, match=r"names no teacher; expected .* one of clip, conv"):
        open_cached_teacher(f"cache:{cached.cache}")
    with pytest.raises(CacheError, match=r"holds no teacher 'clap'\. Did you mean 'clip'"):
        open_cached_teacher(f"cache:{cached.cache}#clap")
    with pytest.raises(CacheError, match="holds no cache"):
        open_cached_teacher(f"cache:{tmp_path}#clip")


def test_a_cache_without_the_images_is_refused_with_the_reason(cache_dir, images):
    other = open_cached_teacher(f"cache:{cache_dir}#clip")
    with pytest.raises(CorpusError, match=r"no image of train that can be used.*does not hold it"):
        _without(images, other)


def test_features_of_other_images_are_refused(cached, cache_dir, tmp_path):
    shutil.copytree(cached.cache, tmp_path / "mixed")
    for name in ("cache.json", "index.parquet", "names.parquet"):
        shutil.copy(cache_dir / name, tmp_path / "mixed" / name)
    with pytest.raises(CacheError):
        open_cached_teacher(f"cache:{tmp_path}/mixed#clip")


def test_knn_of_a_cached_teacher_equals_scikit_learn(cached, images, quiet):
    teacher = open_cached_teacher(f"cache:{cached.cache}#conv")
    left = _without(images, teacher)
    score = run_probe(
        ["t"], lambda _: teacher, left, features=None, progress=quiet, k=5, linear=False
    )[0]

    def unit(split):
        keys = [image.sha256 for image in split]
        return torch.nn.functional.normalize(teacher.targets(keys).tokens_BND.mean(1), dim=1)

    model = KNeighborsClassifier(
        5, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(unit(left.train), [image.label for image in left.train])
    assert score.accuracy == model.score(unit(left.test), [image.label for image in left.test])
