"""What a sheet shows is what the cache holds, what the teacher saw, and what the codec lost."""

import shutil

import numpy as np
import pytest
import torch

from builds import OPTIONS, build
from movekd.analysis.resolve_spec import spec_to_run
from movekd.cache import open_cache
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CacheError, CorpusError, UnknownKeyError
from movekd.extract.image_loader import image_transform
from movekd.view.contact_sheet import as_image, draw_sheet, save_sheet
from movekd.view.features import FeatureViewer


@pytest.fixture
def cache(cache_dir):
    return open_cache(cache_dir)


def test_a_view_shows_the_stored_features_and_the_teachers_own_picture(cache, corpus_dir):
    corpus = open_corpus(corpus_dir)
    name = "photos/07.png"
    for view in FeatureViewer(cache, corpus).show(name):
        store = cache[view.teacher]
        targets = store.read(cache.rows([name]))
        assert view.reason is None
        assert view.colours_GGC.shape == (store.grid, store.grid, 3)
        if targets.cls_attention_BHN is None:
            assert view.attention_GG is None
        else:
            mean = targets.cls_attention_BHN[0].mean(0).view(store.grid, store.grid)
            np.testing.assert_array_equal(view.attention_GG, mean.numpy())
        # the picture, normalised as the teacher's input is, is the teacher's input
        transform = image_transform(store.spec, cache.geometry)
        seen = transform(corpus.read_image(int(corpus.rows([name])[0])))
        channels = range(3)
        shown = [transform.normalisation_table[c][view.picture_SSC[..., c]] for c in channels]
        np.testing.assert_array_equal(np.stack(shown), seen)


def test_the_error_is_that_of_decoded_against_exact_tokens(cache, corpus_dir):
    specs = {name: spec_to_run(cache[name], None, None) for name in cache.teachers}
    views = FeatureViewer(cache, open_corpus(corpus_dir), exact=specs, options=OPTIONS).show(
        "photos/03.png"
    )
    for view in views:
        sealed = max(seal.error.max for seal in cache[view.teacher].seals.values())
        assert 0 < view.error_GG.max() <= 1.5 * sealed + 1e-5
        assert view.sealed_error == pytest.approx(view.error_GG.mean(), rel=0.5)


def test_other_weights_are_refused(cache, corpus_dir):
    spec = spec_to_run(cache["clip"], None, None).with_changes(seed=77)
    viewer = FeatureViewer(cache, open_corpus(corpus_dir), ["clip"], {"clip": spec}, OPTIONS)
    with pytest.raises(CacheError, match="give those with --weights"):
        viewer.show("photos/03.png")


def test_what_is_missing_has_a_reason(tmp_path, cache_dir):
    shutil.copytree(cache_dir, tmp_path / "cache")
    for seal in (tmp_path / "cache" / "clip.seals").glob("0*.json"):
        seal.unlink()
    views = FeatureViewer(open_cache(tmp_path / "cache")).show("photos/03.png")
    assert {view.teacher: view.reason for view in views} == {
        "clip": "not built yet",
        "conv": None,
    }
    figure = draw_sheet(views, "unfinished")
    assert "not built yet" in [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_skipped_image_says_why(tmp_path, damaged_corpus, tiny_specs):
    data, position = damaged_corpus
    build(tmp_path / "cache", data, tiny_specs)
    corpus = open_corpus(data)
    key = corpus.index["key"][position].as_py()
    for view in FeatureViewer(open_cache(tmp_path / "cache"), corpus).show(key):
        assert view.colours_GGC is None
        assert "no image that can be read" in view.reason


def test_unknown_images_and_other_corpora_are_sentences(cache, tmp_path, crops):
    with pytest.raises(UnknownKeyError, match=r"nowhere\.png"):
        FeatureViewer(cache).show("nowhere.png")
    (tmp_path / "images").mkdir()
    crops[-1].save(tmp_path / "images" / "other.png")
    pack_folder(tmp_path / "images", tmp_path / "data", num_workers=1)
    with pytest.raises(CorpusError, match="give the --shards that the cache"):
        FeatureViewer(cache, open_corpus(tmp_path / "data")).show("photos/03.png")


def test_a_sheet_has_a_column_for_what_there_is(cache, corpus_dir, tmp_path):
    bare = draw_sheet(FeatureViewer(cache, teachers=["conv"]).show("photos/01.png"), "bare")
    assert len(bare.axes) == 1
    views = FeatureViewer(cache, open_corpus(corpus_dir)).show("photos/01.png")
    whole = draw_sheet(views, "whole")
    assert len(whole.axes) == 6  # two teachers: picture, tokens, attention
    titles = [axes.get_title(loc="left") for axes in whole.axes]
    assert any(title.startswith("clip  4x4  int8  error") for title in titles)
    assert all("RANDOM WEIGHTS" in title for title in titles if title)
    save_sheet(whole, tmp_path / "sheets" / "one.png")
    assert (tmp_path / "sheets" / "one.png").read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(as_image(whole))
    assert pixels.std() > 10


def test_colours_stay_when_more_of_the_cache_is_there(cache):
    first = FeatureViewer(cache)
    before = first.show("photos/02.png")
    again = FeatureViewer(cache, known=first.bases)
    assert again.bases.keys() == {"clip", "conv"}
    for one, two in zip(before, again.show("photos/02.png"), strict=True):
        assert torch.equal(torch.from_numpy(one.colours_GGC), torch.from_numpy(two.colours_GGC))


@pytest.mark.parametrize("name", ["$\\frac{$.png", "a\0b\x1b[2J\n.png", "\udc80.png", "x" * 5000])
def test_a_title_is_text_whatever_the_image_is_called(cache, name):
    views = FeatureViewer(cache, teachers=["conv"]).show("photos/01.png")
    assert as_image(draw_sheet(views, name)).width > 100
