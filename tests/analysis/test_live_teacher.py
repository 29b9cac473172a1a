"""A live teacher gives what a cache build stores, and its identity covers what decides it."""

import numpy as np
import pytest
import torch

from movekd.analysis.live_teacher import LiveTeacher
from movekd.cache.reader import open_cache
from movekd.corpus.index import open_corpus
from movekd.errors import UnreadableImageError


def test_features_are_those_of_a_cache(corpus_dir, cache_dir, tiny_specs):
    corpus, cache = open_corpus(corpus_dir), open_cache(cache_dir)
    keys = corpus.index["key"].to_pylist()[:10]
    clip, conv = (LiveTeacher(spec, "crop") for spec in tiny_specs)
    for teacher, name in ((clip, "clip"), (conv, "conv")):
        found = teacher.encode(keys, (corpus.read_image(row) for row in range(10)))
        stored = cache[name].read(cache.rows(keys))
        side = cache[name].grid
        error = found.resize(side).tokens_BND - stored.tokens_BND
        assert error.norm() < 0.02 * stored.tokens_BND.norm()  # the codec's
    assert found.cls_BD is None
    found = clip.encode(keys, (corpus.read_image(row) for row in range(10)))
    stored = cache["clip"].read(cache.rows(keys))
    torch.testing.assert_close(found.cls_BD, stored.cls_BD, rtol=1e-3, atol=1e-3)
    assert found.cls_attention_BHN is None


def test_identity_covers_weights_layer_and_geometry(tiny_specs):
    spec = tiny_specs[0]
    same, again = (LiveTeacher(spec, "crop").identity for _ in range(2))
    assert same == again
    others = {
        LiveTeacher(spec, "pad").identity,
        LiveTeacher(spec.with_changes(seed=1), "crop").identity,
        LiveTeacher(spec.with_changes(layer=-1), "crop").identity,
    }
    assert len(others | {same}) == 4


def test_identity_of_a_python_teacher_covers_the_file_of_its_factory(
    tmp_path, monkeypatch, tiny_specs
):
    source = "from torch import nn\ndef network():\n    return nn.Conv2d(3, 4, 8, 8)\n"
    identities = set()
    for name, text in (("probe_net_a", source), ("probe_net_b", source + "\nSCALE = 2\n")):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        spec = tiny_specs[1].with_changes(
            provider="python", model="own", factory=f"{name}:network", model_args={}, grid="native"
        )
        teacher = LiveTeacher(spec, "crop")
        identities.add(teacher.identity)
    assert len(identities) == 2
    buffer = np.zeros((3, 3, 3), np.uint8).tobytes()
    with pytest.raises(UnreadableImageError):
        teacher.encode(["a"], [buffer])
