"""The grid shows each name of a cache on one page, with the picture of its own image."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from movekd.cache.catalog import open_catalog
from movekd.cache.storage import open_storage
from movekd.corpus.decode import decode_image
from movekd.corpus.index import open_corpus
from movekd.view import thumbnails
from movekd.view.html import grid_html
from movekd.view.thumbnails import Thumbnail, Thumbnails, first_name, read_thumbnails


@pytest.fixture
def catalog(cache_dir):
    return open_catalog(open_storage(cache_dir))


def test_the_pages_hold_every_name_once_with_its_picture(catalog, corpus_dir, monkeypatch):
    monkeypatch.setattr(thumbnails, "NUM_SHOWN", 7)
    corpus, names = open_corpus(corpus_dir), []
    num_pages = read_thumbnails(catalog, corpus, 1).num_pages
    for number in range(1, num_pages + 1):
        found = read_thumbnails(catalog, corpus, number)
        assert (found.page, found.num_names) == (number, len(catalog.names))
        assert len(found.shown) == 7 or number == num_pages
        for each in found.shown:
            names.append(each.name)
            image = decode_image(corpus.read_image(int(corpus.rows([each.name])[0])))
            picture = Image.open(io.BytesIO(each.jpeg)).convert("RGB")
            assert max(picture.size) <= 128
            expected = np.asarray(image.resize(picture.size), np.float32)
            assert np.abs(np.asarray(picture, np.float32) - expected).mean() < 12
    assert names == catalog.names["name"].to_pylist()
    assert first_name(catalog) == names[0]


def test_names_and_images_in_another_order_are_joined_by_key(catalog, corpus_dir, monkeypatch):
    corpus = open_corpus(corpus_dir)
    expected = read_thumbnails(catalog, corpus, 1)
    whole = corpus.index.slice
    monkeypatch.setattr(corpus.index, "slice", lambda start, *rest: whole(start + 1, *rest))
    assert read_thumbnails(catalog, corpus, 1) == expected


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (-5, 1), (10**25, None)])
def test_a_page_that_does_not_exist_is_the_nearest_one(catalog, corpus_dir, asked, given):
    found = read_thumbnails(catalog, open_corpus(corpus_dir), asked)
    assert found.page == (given or found.num_pages)


def test_a_damaged_image_says_so_and_the_others_are_shown(catalog, corpus_dir, tmp_path):
    shutil.copytree(corpus_dir, tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    place = corpus.index.slice(3, 1).to_pylist()[0]
    with (tmp_path / "data" / place["shard"]).open("r+b") as tar:
        tar.seek(place["offset"] + 20)
        tar.write(b"damaged")
    shown = read_thumbnails(catalog, corpus, 1).shown
    assert [each.label for each in shown] == ["", "", "", "damaged", *[""] * (len(shown) - 4)]
    assert "have SHA-256" in shown[3].problem


def test_without_shards_the_names_are_shown(catalog):
    found = read_thumbnails(catalog, None, 1)
    assert {each.label for each in found.shown} == {"no picture without --shards"}
    page = grid_html(found)
    assert page.count("<button") == len(found.shown)
    assert "<img" not in page


def test_names_of_others_become_no_tags():
    name = 'a/<img src=x onerror=alert(1)>"x'
    page = grid_html(Thumbnails(1, 1, 1, [Thumbnail(name, None, "<b>", "<i>")]))
    assert "<img" not in page
    assert "<b>" not in page
    assert 'onerror=alert(1)>"' not in page
