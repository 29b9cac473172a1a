"""Colours of tokens: the same features look the same, and what differs can be told apart."""

import numpy as np
import pytest
import torch

from movekd.cache import open_cache
from movekd.errors import CacheError
from movekd.view.pca import fit_basis, fit_teacher_basis, readable_rows


@pytest.fixture
def clusters():
    """300 tokens of three kinds in 20 channels, and which kind each is."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(300) % 3
    centres = 5 * torch.randn(3, 20, generator=generator)
    return centres[kinds] + 0.1 * torch.randn(300, 20, generator=generator), kinds


def test_kinds_of_tokens_have_colours_of_their_own(clusters):
    tokens, kinds = clusters
    colours = fit_basis(tokens).colours(tokens)
    assert colours.shape == (300, 3)
    assert ((colours >= 0) & (colours <= 1)).all()
    means = np.stack([colours[kinds == kind].mean(0) for kind in range(3)])
    apart = np.linalg.norm(means[:, None] - means, axis=-1)[np.triu_indices(3, 1)]
    within = max(colours[kinds == kind, :2].std(0).max() for kind in range(3))
    assert apart.min() > 5 * within


def test_a_basis_is_the_same_whatever_was_drawn_before(clusters):
    tokens, _ = clusters
    first = fit_basis(tokens)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    second = fit_basis(tokens)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.axes_D3, second.axes_D3)


def test_tokens_of_skipped_images_count_for_nothing(clusters):
    tokens, _ = clusters
    holed = torch.cat([tokens, torch.full((7, 20), torch.nan)])
    assert torch.equal(fit_basis(holed).axes_D3, fit_basis(tokens).axes_D3)


def test_too_few_tokens_are_a_sentence():
    with pytest.raises(CacheError, match="2 tokens of 20 channels"):
        fit_basis(torch.randn(2, 20))


def test_readable_rows_leave_out_what_is_not_built(cache_dir, monkeypatch):
    cache = open_cache(cache_dir)
    store = cache["clip"]
    assert readable_rows(store, cache.catalog).tolist() == cache.catalog.rows.tolist()
    store._sealed[:] = False
    assert not len(readable_rows(store, cache.catalog))
    with pytest.raises(CacheError, match="nothing of teacher 'clip'"):
        fit_teacher_basis(store, cache.catalog)
