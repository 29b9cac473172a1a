"""Tests of movekd.train.held_out: which samples a run does not learn from."""

import contextlib
import json
import math

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.config import validate
from movekd.corpus.conversations import Conversation
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError, UnknownKeyError
from movekd.train.data_keys import DataConfig
from movekd.train.held_out import choose, describe_split, split_conversations, split_images


def data_of(digits, **keys):
    return validate(DataConfig, {"shards": str(digits.data), **keys}, "data")


def write(path, conversations):
    """Write conversations of these images (names or keys) as LLaVA's JSON."""
    lines = [conversation.to_json() for conversation in conversations]
    path.write_text(f"[{', '.join(lines)}]")
    return str(path)


def conversation(identity, images, text="a 3"):
    question = "<image>" * len(images) + "What?"
    return Conversation(identity, tuple(images), (("human", question), ("gpt", text)))


@given(
    st.lists(st.lists(st.integers(0, 11), max_size=3), min_size=2, max_size=30),
    st.one_of(st.floats(0.01, 0.9), st.integers(1, 20)),
    st.randoms(use_true_random=False),
)
@settings(max_examples=30, derandomize=True, deadline=None, database=None)
def test_no_image_is_in_both_parts_and_the_order_of_the_file_means_nothing(
    digits, tmp_path_factory, images_of, size, random
):
    corpus = open_corpus(digits.data)
    keys = corpus.index["key"].to_pylist()
    every = [
        conversation(f"c{at}", [keys[image] for image in images], f"{at % 7}")
        for at, images in enumerate(images_of)
    ]
    path = tmp_path_factory.mktemp("split") / "all.json"
    data = data_of(digits, val_size=size, conversations=[write(path, every)])
    trained, held = [], []
    with contextlib.suppress(ConfigError):
        ((trained, held),) = split_conversations(data, [corpus])
    if not held:  # refused; see the next tests
        return
    assert sorted([*trained, *held], key=lambda c: int(c.id[1:])) == every
    assert trained
    number = size if size >= 1 else math.ceil(round(size * len(every), 6))
    assert 1 <= len(held) <= number
    images = [{name for c in part for name in c.images} for part in (trained, held)]
    assert not images[0] & images[1]
    texts = [{c.turns for c in part if not c.images} for part in (trained, held)]
    assert not texts[0] & texts[1]
    random.shuffle(every)
    write(path, every)
    again = split_conversations(data, [corpus])[0][1]
    assert {c.id for c in again} == {c.id for c in held}

    # two sources of one corpus hold out what one source of both files does
    cut = random.randrange(len(every) + 1)
    sources = [
        {"shards": str(digits.data), "conversations": [str(write(path.with_name(name), part))]}
        for name, part in (("a.json", every[:cut]), ("b.json", every[cut:]))
    ]
    of_both = validate(DataConfig, {"sources": sources, "val_size": size}, "data")
    parts = split_conversations(of_both, [corpus, corpus])
    assert {c.id for _, found in parts for c in found} == {c.id for c in held}
    for (learned, kept_out), part in zip(parts, (every[:cut], every[cut:]), strict=True):
        assert sorted(c.id for c in (*learned, *kept_out)) == sorted(c.id for c in part)


def test_a_share_holds_out_what_it_says_and_a_larger_one_more_of_the_same():
    groups = np.random.default_rng(0).integers(2**64, size=10_000, dtype=np.uint64)
    small, large = choose(groups, 0.01, "images"), choose(groups, 0.05, "images")
    assert (small.sum(), large.sum()) == (100, 500)
    assert not (small & ~large).any()
    assert choose(groups, 137, "images").sum() == 137
    assert choose(groups[:30], 0.1, "images").sum() == 3  # 0.1 x 30 is above 3 in floating point


@pytest.mark.parametrize(
    ("groups", "size", "said"),
    [
        ([7, 8], 2, r"val_size 2 would hold out all of the 2 images; expected some"),
        ([7], 0.5, r"val_size 0\.5 would hold out all of the 1 images"),
        ([7, 7, 8, 8], 1, r"out none of the 4 images, which are 2 groups that share no image"),
    ],
)
def test_an_empty_part_is_refused(groups, size, said):
    with pytest.raises(ConfigError, match=said):
        choose(np.array(groups, np.uint64), size, "images")


def test_the_stages_hold_out_the_same_images(digits, tmp_path):
    corpus = open_corpus(digits.data)
    keys = corpus.index["key"].to_pylist()
    path = write(tmp_path / "all.json", [conversation(f"c{n}", [k]) for n, k in enumerate(keys)])
    (is_held,) = split_images(data_of(digits, val_size=0.25), [corpus])
    data = data_of(digits, val_size=0.25, conversations=[path])
    ((_, held),) = split_conversations(data, [corpus])
    assert [c.images[0] for c in held] == [k for k, is_ in zip(keys, is_held, strict=True) if is_]


def test_stage_distill_holds_out_the_images_of_conversations(digits, tmp_path):
    corpus = open_corpus(digits.data)
    keys = corpus.index["key"].to_pylist()
    path = write(tmp_path / "some.json", [conversation("c", keys[2:4]), conversation("text", [])])
    data = data_of(digits, eval_conversations=[path])
    assert split_images(data, [corpus])[0].nonzero()[0].tolist() == [2, 3]
    config = digits.config("distill", f"data.eval_conversations=[{path}]", "training.eval_steps=1")
    _, _, dataset, _ = digits.parts(config)
    assert sorted(dataset[at].key for at in range(len(dataset))) == sorted(keys[:2] + keys[4:])
    everything = write(tmp_path / "all.json", [conversation("c", keys)])
    with pytest.raises(
        ConfigError, match=r"name 33 of the 33 images .*; expected some and not all"
    ):
        split_images(data_of(digits, eval_conversations=[everything]), [corpus])


def test_a_held_out_image_that_is_not_in_the_corpus_is_named(digits, tmp_path):
    path = write(tmp_path / "odd.json", [conversation("c", ["nowhere.png"])])
    config = digits.config("pretrain", f"data.eval_conversations=[{path}]", "training.eval_steps=1")
    with pytest.raises(UnknownKeyError, match=r"nowhere\.png"):
        digits.parts(config)
    (tmp_path / "none.json").write_text("[]")
    config = digits.config(
        "pretrain", f"data.eval_conversations=[{tmp_path}/none.json]", "training.eval_steps=1"
    )
    with pytest.raises(ConfigError, match=r"data\.eval_conversations hold no conversation"):
        digits.parts(config)
    missing = f"data.eval_conversations=[{tmp_path}/missing.json]"
    with pytest.raises(ConfigError, match=r"missing\.json does not exist; expected LLaVA"):
        digits.train(tmp_path / "run", "pretrain", missing, "training.eval_steps=1")
    assert not (tmp_path / "run").exists()


def test_images_that_are_trained_on_too_are_counted(digits):
    path = digits.source / "pretrain.json"
    entries = json.loads(path.read_text())
    config = digits.config("pretrain", f"data.eval_conversations=[{path}]", "training.eval_steps=1")
    number = len({entry["image"] for entry in entries})
    assert describe_split(config) == (
        "24 conversations are held out, 24 are trained on; "
        f"{number} images of the held-out ones are trained on, too."
    )
    assert describe_split(digits.config("pretrain")) is None
    split = digits.config("distill", "data.val_size=5", "training.eval_steps=1")
    assert describe_split(split) == "5 images are held out, 28 are trained on."


def test_a_number_stays_a_number_and_a_share_a_share(digits):
    for text in ("0.25", "7"):
        config = digits.config("pretrain", f"data.val_size={text}", "training.eval_steps=1")
        found = yaml.safe_load(config.to_yaml())["data"]["val_size"]
        assert found == float(text)
    for text in ("0", "-1", "1.5", "true", ".nan"):
        with pytest.raises(ConfigError, match=r"data\.val_size: "):
            digits.config("pretrain", f"data.val_size={text}", "training.eval_steps=1")
    with pytest.raises(ConfigError, match=r"data\.val_set_size'.*Did you mean 'val_size'"):
        digits.config("pretrain", "data.val_set_size=0.1")
