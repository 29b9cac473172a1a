"""What the page is told about a cache."""

import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builds import build
from movekd.corpus.index import open_corpus
from movekd.errors import UnknownKeyError
from movekd.view.browser import NUM_NEAREST, Browser
from movekd.view.gate import MAX_IMAGE_BYTES
from movekd.view.html import IMAGE_SCRIPT, experts_html, message_html, teachers_html


@pytest.fixture
def browser(cache_dir, corpus_dir):
    return Browser(str(cache_dir), open_corpus(corpus_dir))


@pytest.fixture(scope="module")
def all_heads(tmp_path_factory, corpus_dir, tiny_specs):
    """Of a cache that stores the attention of every head."""
    out = tmp_path_factory.mktemp("heads") / "cache"
    build(out, corpus_dir, [tiny_specs[0].with_changes(cls_attention_heads="all")])
    return Browser(str(out), open_corpus(corpus_dir))


def test_search_finds_names_and_keys(browser):
    assert browser.search("photos/0") == [f"photos/{n:02d}.png" for n in range(10)]
    key = browser.draw()
    assert key in browser.search(key[:12])
    assert browser.search("../../etc") == []


def test_nearest_tokens_are_those_of_the_largest_cosine(browser):
    name = "photos/05.png"
    for panel in browser.panels(name, ["clip", "conv"]):
        store = browser.cache[panel.features.teacher]
        tokens = store.read(browser.cache.rows([name])).standardised_BND[0].numpy()
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        cosine = tokens @ tokens.T
        for token, (near, said) in enumerate(zip(panel.nearest_NK, panel.cosine_NK, strict=True)):
            others = [at for at in range(len(tokens)) if at != token]
            best = sorted(others, key=lambda at: -cosine[token, at])[:NUM_NEAREST]
            assert set(near) <= set(others)
            np.testing.assert_allclose(said, cosine[token, best], atol=1e-5)
        assert panel.shard_error[0] <= panel.shard_error[1]


def test_a_head_of_attention_is_that_head(all_heads):
    name = "photos/05.png"
    stored = all_heads.cache["clip"].read(all_heads.cache.rows([name])).cls_attention_BHN[0]
    assert len(stored) == 4
    for head in range(stored.shape[0]):
        (panel,) = all_heads.panels(name, ["clip"], head=head)
        assert (panel.heads, panel.head) == (stored.shape[0], head)
        assert torch.equal(torch.from_numpy(panel.features.attention_GG).flatten(), stored[head])


def test_a_head_that_there_is_not_is_their_mean(all_heads, browser):
    name = "photos/05.png"
    mean, missing = (all_heads.panels(name, ["clip"], head=head)[0] for head in (None, 4))
    assert missing.head is None
    np.testing.assert_array_equal(missing.features.attention_GG, mean.features.attention_GG)
    assert "mean of 4 heads" in teachers_html([missing], name)
    stored, missing = (browser.panels(name, ["clip"], head=head)[0] for head in (None, 0))
    assert (missing.heads, missing.head) == (1, None)
    np.testing.assert_array_equal(missing.features.attention_GG, stored.features.attention_GG)
    np.testing.assert_allclose(stored.features.attention_GG, mean.features.attention_GG, atol=1e-4)
    assert "mean of the heads" in teachers_html([missing], name)


def test_missing_keys_and_paths_are_sentences(browser):
    for name in ("nowhere.png", "/etc/passwd", "../index.parquet"):
        with pytest.raises(UnknownKeyError, match="holds no image"):
            browser.panels(name, ["clip"])


def test_a_cache_that_is_being_built_is_opened_again(tmp_path, cache_dir):
    shutil.copytree(cache_dir, tmp_path / "cache")
    seals = sorted((tmp_path / "cache" / "clip.seals").glob("0*.json"))
    held = [(path, path.read_bytes()) for path in seals]
    for path in seals:
        path.unlink()
    browser = Browser(str(tmp_path / "cache"))
    (panel,) = browser.panels("photos/05.png", ["clip"])
    assert panel.features.reason == "not built yet"
    assert "not built yet" in teachers_html([panel], "x")
    for path, content in held:
        path.write_bytes(content)
    (panel,) = browser.panels("photos/05.png", ["clip"])
    assert panel.features.reason is None


def test_a_teacher_that_came_later_is_found_by_opening_again(tmp_path, corpus_dir, tiny_specs):
    build(tmp_path / "cache", corpus_dir, tiny_specs[:1])
    browser = Browser(str(tmp_path / "cache"))
    build(tmp_path / "cache", corpus_dir, tiny_specs[1:])
    assert list(browser.cache.teachers) == ["clip"]
    browser.reopen()
    assert list(browser.cache.teachers) == ["clip", "conv"]


def test_html_escapes_what_comes_from_outside(browser):
    bad = "<img src=x onerror=alert(1)>"
    panels = browser.panels("photos/05.png", ["clip", "conv"])
    assert bad not in teachers_html(panels, bad)
    assert bad not in message_html(bad)
    page = teachers_html(panels, "photos/05.png")
    assert page.count("data-nearest=") == 2
    assert "random weights" in page


def test_experts_are_shown_with_their_shares():
    page = experts_html(np.array([[0, 1], [1, 1]], np.int8), 3, None)
    assert "expert 0: 25%" in page
    assert "expert 1: 75%" in page
    assert "expert 2: 0%" in page


def test_browser_and_server_agree_on_the_largest_image():
    assert f"file.size > {MAX_IMAGE_BYTES}" in IMAGE_SCRIPT


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.text())
def test_no_text_of_a_file_becomes_a_tag(text):
    page = teachers_html([], text) + message_html(text)
    assert re.findall(r"</?[a-z]+", page) == ["<div", "<div", "</div", "</div", "<div", "</div"]
    for name in ("class", "role"):
        page = re.sub(rf' {name}="[a-z-]+"', "", page)
    assert re.search(r"<[^>]*[=\"']", page) is None
