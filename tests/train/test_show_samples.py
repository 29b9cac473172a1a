"""Tests of movekd.train.show_samples: what is shown is what the training reads."""

import re

import pytest
import transformers

from movekd.errors import ConfigError
from movekd.student.tokenization import IGNORED
from movekd.train.show_samples import show_samples


@pytest.mark.parametrize("recipe", ["official", "revised"])
@pytest.mark.parametrize(("stage", "number"), [("pretrain", 3), ("finetune", 16)])
def test_what_is_shown_is_what_the_training_reads(digits, stage, number, recipe):
    config = digits.config(stage, f"recipe={recipe}", "distill=null")
    _, _, dataset, _ = digits.parts(config)
    shown = show_samples(config, number)
    assert len(shown) == number
    assert len({sample.id for sample in shown}) == number
    by_id = {conversation.id: n for n, conversation in enumerate(dataset.conversations)}
    for sample in shown:
        read = dataset[by_id[sample.id]]
        assert (sample.input_ids, sample.labels) == (read.input_ids, read.labels)
        assert sample.num_samples == len(dataset)


def test_marks_stand_around_what_is_learned(digits):
    sample = next(s for s in show_samples(digits.config("finetune"), 16) if s.id == "two")
    head, text = sample.as_text().split("\n")
    num_learned = sum(label != IGNORED for label in sample.labels)
    assert head.endswith(f": {len(sample.input_ids)} tokens, {num_learned} learned")
    assert "<image>x72" in text  # two images, of which this tokenizer keeps no line break apart
    marked = " ".join(re.findall(r"\[\[ (.*?) \]\]", text)).split()
    expected = zip(sample.pieces, sample.labels, strict=True)
    assert marked == [piece for piece, label in expected if label != IGNORED]


def test_no_weights_are_loaded(digits, monkeypatch):
    for name in ("AutoModel", "AutoModelForCausalLM"):
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *a, **k: pytest.fail("weights")
        )
    assert len(show_samples(digits.config("finetune"), 100)) == 16


def test_a_run_without_text_has_nothing_to_show(digits):
    with pytest.raises(ConfigError, match=r"stage: distill reads no text"):
        show_samples(digits.config("distill"), 3)
