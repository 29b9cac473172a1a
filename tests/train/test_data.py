"""Tests of movekd.train.data: samples joined to images and targets by key."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from corpus_files import make_unreadable
from movekd.cache import open_cache
from movekd.corpus.conversations import Conversation, load_conversations
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, ConfigError, UnknownKeyError, UnreadableImageError
from movekd.student.tokenization import IGNORED
from movekd.train.data import ConversationDataset, Sample, read_conversations


@pytest.fixture(scope="module")
def finetune(digits):
    """The student, conversations and collator of a finetune run."""
    _, student, dataset, collator = digits.parts(digits.config("finetune"))
    return student, dataset, collator


def remake(digits, finetune, conversations, cache=None):
    student, _, _ = finetune
    corpus = open_corpus(digits.data)
    teachers = [] if cache is None else ["clip", "sam"]
    return ConversationDataset(
        conversations,
        corpus,
        cache,
        teachers,
        student.tokenizer,
        student.count_tokens,
        "v1",
        "revised",
        512,
    )


def test_every_sample_has_its_own_images_and_rows(digits, finetune):
    _, dataset, _ = finetune
    corpus, cache = open_corpus(digits.data), open_cache(digits.cache)
    keys, row_keys = corpus.index["key"].to_pylist(), cache.keys.to_pylist()
    assert len(dataset) == 16
    for position, conversation in enumerate(dataset.conversations):
        sample = dataset[position]
        assert sample.key == conversation.id
        expected = (
            [keys[i] for i in corpus.rows(conversation.images)] if conversation.images else []
        )
        assert [keys[image] for image in sample.images] == expected
        assert [row_keys[row] for row in sample.rows] == expected
    assert dataset[0].images == dataset[2].images  # one image, two conversations
    assert len(set(dataset[10].images)) == 2  # two images, one conversation
    assert dataset[11].images == dataset[11].rows == []


def test_a_batch_holds_each_samples_text_pixels_and_targets(digits, finetune):
    student, dataset, collator = finetune
    samples = [dataset[position] for position in (0, 10, 11, 2)]
    batch = collator(samples)
    corpus, cache = open_corpus(digits.data), open_cache(digits.cache)
    for i, sample in enumerate(samples):
        length = len(sample.input_ids)
        assert batch["input_ids"][i, :length].tolist() == sample.input_ids
        assert batch["labels"][i, :length].tolist() == sample.labels
        assert (batch["input_ids"][i, length:] == student.tokenizer.pad_token_id).all()
        assert (batch["labels"][i, length:] == IGNORED).all()
        assert batch["attention_mask"][i].sum() == length
    images = [image for sample in samples for image in sample.images]
    rows = [row for sample in samples for row in sample.rows]
    transform = student.image_transform("crop")
    expected = np.stack([transform(corpus.read_image(image)) for image in images])
    assert torch.equal(batch["pixel_values"], torch.from_numpy(expected))
    for teacher in ("clip", "sam"):
        alone = torch.cat([cache[teacher].read([row]).tokens_BND for row in rows])
        assert torch.equal(batch["targets"][teacher].tokens_BND, alone)
    assert batch["keys"] == [sample.key for sample in samples]


def test_an_image_that_cannot_be_decoded_is_named(digits, finetune, tmp_path):
    shutil.copytree(digits.data, tmp_path / "data")
    key = make_unreadable(tmp_path / "data", 0)
    collator = replace(finetune[2], corpus=open_corpus(tmp_path / "data"), cache=None)
    with pytest.raises(UnreadableImageError, match=f"^image {key} of .*no image that can be read"):
        collator([Sample("a", [1], [1], [0], [])])


def test_a_text_only_batch_has_neither_pixels_nor_targets(finetune):
    _, dataset, collator = finetune
    batch = collator([dataset[11], dataset[12]])
    assert batch["pixel_values"] is None
    assert batch["targets"] is None


def test_without_a_cache_there_are_no_rows(digits, finetune):
    dataset = remake(digits, finetune, finetune[1].conversations)
    assert dataset[0].rows == []
    assert dataset[0].images == finetune[1][0].images


def test_lengths_are_llavas_words_and_negative_for_text_only_samples(finetune):
    """LLaVA splits every turn at blanks as the JSON has it, `<image>` included; no image tokens."""
    _, dataset, _ = finetune
    lengths = dataset.modality_lengths()
    assert {length > 0 for length in lengths} == {True, False}
    for length, conversation in zip(lengths, dataset.conversations, strict=True):
        entry = json.loads(conversation.to_json())
        words = sum(len(turn["value"].split()) for turn in entry["conversations"])
        assert length == (words if "image" in entry else -words)


def test_it_travels_to_a_spawned_worker(finetune):
    _, dataset, collator = finetune
    dataset_there, collator_there = pickle.loads(pickle.dumps((dataset, collator)))  # noqa: S301
    here, there = collator([dataset[0]]), collator_there([dataset_there[0]])
    assert torch.equal(here["pixel_values"], there["pixel_values"])
    assert torch.equal(here["targets"]["sam"].tokens_BND, there["targets"]["sam"].tokens_BND)


def test_a_missing_image_is_named(digits, finetune):
    lost = Conversation("lost", ("gone.png",), (("human", "<image>"), ("gpt", "7")))
    with pytest.raises(UnknownKeyError, match=r"gone\.png"):
        remake(digits, finetune, [*finetune[1].conversations, lost], open_cache(digits.cache))


def test_no_conversation_is_an_error(digits, finetune):
    with pytest.raises(ConfigError, match="holds no conversation to train on"):
        remake(digits, finetune, [])


def test_a_skipped_image_is_refused_by_name(digits, finetune, monkeypatch):
    cache = open_cache(digits.cache)
    image = finetune[1].conversations[0].images[0]
    row = int(cache.rows([image])[0])
    monkeypatch.setattr(type(cache["sam"]), "skipped", {row: "cannot be decoded"})
    with pytest.raises(CacheError, match=rf"no features of 1 images .*'{image}' first \(cannot be"):
        remake(digits, finetune, finetune[1].conversations, cache)
    others = [c for c in finetune[1].conversations if image not in c.images]
    assert len(remake(digits, finetune, others, cache)) < 16


def test_conversations_come_from_files_or_from_the_corpus(digits, tmp_path):
    corpus = open_corpus(digits.data)
    packed = read_conversations(digits.config("pretrain", "data.conversations=[]").data, corpus)
    assert len(packed) == 40
    both = [str(digits.source / f"{stage}.json") for stage in ("finetune", "pretrain")]
    data = digits.config("pretrain", f"data.conversations={json.dumps(both)}").data
    expected = [c for path in both for c in load_conversations(path)]
    assert read_conversations(data, corpus) == expected
    data = digits.config("pretrain", f"data.conversations=[{tmp_path}/no.json]").data
    with pytest.raises(ConfigError, match=r"no\.json does not exist"):
        read_conversations(data, corpus)
