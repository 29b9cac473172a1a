"""The fit to the teachers of a cache: a teacher fits itself, noise fits nothing, sums are right."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from movekd.cache.grid import resize_tokens
from movekd.cache.reader import open_cache
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError
from movekd.evaluate.encoder.cached_teacher import CachedTeacher
from movekd.evaluate.encoder.encoders import load_encoder
from movekd.evaluate.encoder.probed_model import EncoderTokens
from movekd.evaluate.encoder.teacher_fit import MIN_IMAGES, TeacherFits, choose_fit_images


class Noise:
    """A model whose tokens say nothing about the image."""

    identity, geometry = None, "crop"

    def encode(self, keys, contents):
        rows = [np.random.default_rng(int(key[:8], 16)).normal(size=(16, 6)) for key in keys]
        return EncoderTokens(torch.tensor(np.stack(rows), dtype=torch.float32), None)


@pytest.fixture(scope="module")
def cache(cached):
    return open_cache(cached.cache)


@pytest.fixture(scope="module")
def chosen(cached, cache):
    corpus = open_corpus(cached.shards)
    keys = corpus.index["key"].combine_chunks()
    return choose_fit_images(
        cache, keys, lambda some: map(corpus.read_image, corpus.rows(some).tolist()), 60
    )


def test_found_is_used_plus_reasons(chosen, cache, cached):
    assert (chosen.num_found, len(chosen.keys), sum(chosen.skipped.values())) == (95, 60, 35)
    corpus_keys = open_corpus(cached.shards).index["key"].to_pylist()
    assert chosen.keys == sorted(corpus_keys)[:60]
    absent = pa.array([*corpus_keys, "0" * 64, "0" * 64, "1" * 64])
    found = choose_fit_images(cache, absent, iter, 1000)
    assert (found.num_found, len(found.keys)) == (97, 95)
    assert found.skipped == {f"{cache.url}#clip has no features of it": 2}
    with pytest.raises(ConfigError, match=f"3 of 5 images have .* expected {MIN_IMAGES} or more"):
        choose_fit_images(cache, pa.array([*corpus_keys[:3], "0" * 64, "1" * 64]), iter, 1000)


def test_a_teacher_fits_itself_and_noise_fits_nothing(chosen, cache, quiet):
    fits = TeacherFits(chosen, quiet)
    fits.measure("itself", CachedTeacher(cache, "clip"))
    fits.measure("noise", Noise())
    of = {(s.model, s.teacher, s.measure): s for s in fits.scores}
    assert of["itself", "clip", "r2"].value > 0.999
    assert len(of["itself", "clip", "r2"].channel_groups) == 2  # 144 channels
    assert of["itself", "clip", "cka"].value > 0.9
    noise = of["noise", "clip", "r2"]
    assert noise.value < 0.05
    assert noise.difference == pytest.approx(noise.value - of["itself", "clip", "r2"].value)
    low, high = noise.difference_interval
    assert low <= noise.difference <= high < 0
    assert of["itself", "clip", "r2"].difference is None


def test_r2_of_a_student_equals_scikit_learn_on_the_same_images(chosen, cache, run, quiet):
    fits, encoder = TeacherFits(chosen, quiet), load_encoder(str(run))
    fits.measure("student", encoder)
    score = next(s for s in fits.scores if (s.teacher, s.measure) == ("conv", "r2"))
    tokens = encoder.encode(chosen.keys, chosen.read(chosen.keys)).tokens_BND
    targets = cache["conv"].read(cache.rows(chosen.keys)).standardised_BND.clamp(-8, 8)
    side = int(tokens.shape[1] ** 0.5)
    goals = resize_tokens(targets, side)
    is_read = np.arange(len(chosen.keys)) % 5 == 0

    def flat(part, which):
        return part[torch.from_numpy(which)].flatten(0, 1).double().numpy()

    scaler = StandardScaler().fit(flat(tokens, ~is_read))
    x = scaler.transform(flat(tokens, ~is_read))
    model = Ridge(alpha=score.strength * len(x)).fit(x, flat(goals, ~is_read))
    predicted = model.predict(scaler.transform(flat(tokens, is_read)))
    wanted = r2_score(flat(goals, is_read), predicted, multioutput="variance_weighted")
    assert score.value == pytest.approx(wanted, abs=1e-6)
    low, high = score.interval
    assert low < score.value < high
    assert [s.value for s in _again(chosen, quiet, encoder)] == [s.value for s in fits.scores]


def _again(chosen, quiet, encoder):
    fits = TeacherFits(chosen, quiet)
    fits.measure("student", encoder)
    return fits.scores
