"""A provider is one function and one registration, also from outside the package."""

import pytest
import torch
from torch import nn

from builds import build
from movekd.cache.reader import open_cache
from movekd.cache.verify import verify
from movekd.errors import ConfigError
from movekd.teachers import Backbone, load_teacher, providers, register_provider
from movekd.teachers.providers import find_downloaded, published


@pytest.fixture
def stripes(monkeypatch, tiny_specs):
    """A spec of a provider that only this test registers."""
    monkeypatch.setattr(providers, "_PROVIDERS", dict(providers._PROVIDERS))

    def stripes_backbone(spec) -> Backbone:
        width = spec.model_args["width"]
        module = nn.Conv2d(3, width, kernel_size=16, stride=16)
        return Backbone(module, module)

    register_provider("stripes", stripes_backbone)
    return tiny_specs[1].with_changes(
        name="stripes", provider="stripes", model="s", weights="random", grid="native",
        model_args={"width": 20}, image_size=64, layer="last",
    )  # fmt: skip


def test_a_registered_provider_builds_a_cache(tmp_path, corpus_dir, stripes) -> None:
    (summary,) = build(tmp_path / "cache", corpus_dir, [stripes])
    assert summary.status.teacher == "stripes"
    store = open_cache(tmp_path / "cache")["stripes"]
    assert store.spec == stripes.with_changes(std_floor=store.spec.std_floor)
    tokens_BND = store.read(range(24)).tokens_BND
    assert tokens_BND.shape == (24, 16, 20)
    assert bool(torch.isfinite(tokens_BND).all())
    assert store.calibration.weights_sha256 == load_teacher(stripes).weights_sha256
    assert list(verify(tmp_path / "cache")) == []
    assert published(stripes).repo is None
    assert find_downloaded(stripes) is None


def test_an_unknown_provider_is_refused_before_anything_is_written(
    tmp_path, corpus_dir, tiny_specs
) -> None:
    wrong = tiny_specs[0].with_changes(provider="tim")
    expected = r"'clip' has provider 'tim'; known providers: transformers, .*mean 'timm'.*Correct"
    with pytest.raises(ConfigError, match=expected):
        load_teacher(wrong)
    with pytest.raises(ConfigError, match=expected):
        build(tmp_path / "cache", corpus_dir, [tiny_specs[1], wrong])
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_an_unknown_provider_is_read(tmp_path, corpus_dir, stripes, monkeypatch) -> None:
    build(tmp_path / "cache", corpus_dir, [stripes])
    del providers._PROVIDERS["stripes"]
    assert open_cache(tmp_path / "cache")["stripes"].read([3]).tokens_BND.shape == (1, 16, 20)
