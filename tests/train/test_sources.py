"""Tests of runs that read several corpora: joined inputs, scales of targets, exact resume."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from movekd.cache.codecs import codec
from movekd.cache.targets import TeacherTargets
from movekd.cli.main import app
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.errors import CacheError, ConfigError
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.train.datasets import read_data
from movekd.train.mixed_targets import MixedTargets
from movekd.train.mixture import Mixture, join
from movekd.train.run import build_model, train
from movekd.train.sources import open_sources

PARTS = ("pretrain", "finetune")


@dataclass(frozen=True)
class Halves:
    """The corpus of the digits as two corpora.

    ``shared`` are caches with the channel statistics of the whole one. Of ``apart``, each has its
    own statistics, and the second one another codec.
    """

    data: list[Path]
    conversations: list[Path]
    shared: list[Path]
    apart: list[Path]

    def keys(self, caches, weights=(1, 1), **more):
        """Return the override that names both corpora."""
        sources = [
            {
                "shards": str(data),
                "cache": str(cache),
                "conversations": [str(conversations)],
                "weight": weight,
                **more,
            }
            for data, conversations, cache, weight in zip(
                self.data, self.conversations, caches, weights, strict=True
            )
        ]
        nothing = ["data.shards=null", "data.conversations=[]"]
        return [*nothing, f"data.sources={json.dumps(sources)}"]


@pytest.fixture(scope="session")
def halves(source, digits, digit_specs, tmp_path_factory):
    """Pack the captions' images and the questions' images apart, and cache both twice."""
    folder = tmp_path_factory.mktemp("halves")
    found = Halves([], [], [], [])
    few_bits = [spec.with_changes(codec="lloyd4") for spec in digit_specs]

    def build(name, data, specs, statistics):
        corpus, options = open_corpus(data), BuildOptions(num_workers=0)
        keys = {"geometry": "crop", "options": options, "channel_stats": statistics}
        list(build_cache(folder / name, corpus, specs, **keys))
        return folder / name

    for part, own_specs in zip(PARTS, (digit_specs, few_bits), strict=True):
        data, conversations = folder / part, source / f"{part}.json"
        pack_llava([conversations], source / "images", data, num_workers=1)
        found.data.append(data)
        found.conversations.append(conversations)
        found.shared.append(build(f"shared_{part}", data, digit_specs, digits.cache))
        found.apart.append(build(f"apart_{part}", data, own_specs, None))
    return found


def open_run(digits, overrides, stage="finetune"):
    """Return the mixture, the collator, the model and the sources of a run."""
    config = digits.config(stage, *overrides)
    sources = open_sources(config, digits.cache)
    torch.manual_seed(0)
    model, student = build_model(config, sources[0].cache)
    data = read_data(config, sources, student)
    return join(data.trained), data.collator, model, sources


def by_key(dataset):
    """Return the samples of a data set by their ids."""
    return {dataset[at].key: dataset[at] for at in range(len(dataset))}


def together(dataset, collator, keys):
    """Return a batch of the samples of these ids."""
    samples = by_key(dataset)
    return collator([samples[key] for key in keys])


def test_a_batch_of_two_corpora_is_the_batch_of_the_corpus_that_holds_both(digits, halves):
    mixed, collator, _, sources = open_run(digits, halves.keys(halves.shared))
    assert isinstance(mixed, Mixture)
    files = [str(path) for path in halves.conversations]
    config = digits.config("finetune", f"data.conversations={files}")
    _, _, whole, whole_collator = digits.parts(config)
    assert by_key(mixed).keys() == by_key(whole).keys()
    assert len(mixed) == len(whole) == 40
    keys = sorted(by_key(whole), key=lambda key: key[::-1])  # captions and questions in turn
    batch, expected = (
        together(mixed, collator, keys),
        together(whole, whole_collator, keys),
    )
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[name], value), name
    for name, targets in expected["targets"].items():
        found = batch["targets"][name]
        assert isinstance(found, TeacherTargets)
        assert found.stored.keys() == targets.stored.keys()
        assert all(torch.equal(found.stored[n], array) for n, array in targets.stored.items())
    assert [s.image_start for s in sources] == [0, len(sources[0].corpus)]


def test_targets_of_caches_with_other_statistics_have_the_scale_of_the_first(digits, halves):
    mixed, collator, model, sources = open_run(digits, halves.keys(halves.apart))
    keys = list(by_key(mixed))[::3]
    batch = together(mixed, collator, keys)
    shared, shared_collator, *_ = open_run(digits, halves.keys(halves.shared))
    reference = together(shared, shared_collator, keys)
    for name, targets in batch["targets"].items():
        assert isinstance(targets, MixedTargets)
        expected, first = reference["targets"][name], sources[0].cache[name].stats
        other = sources[1].cache[name].stats
        assert not torch.equal(first.mean_D, other.mean_D)  # there is something to bring together
        tokens = expected.tokens_BND
        error = (targets.tokens_BND - tokens).norm() / (tokens - tokens.mean((0, 1))).norm()
        assert error < 0.1  # a 4-bit codec against int8
        scale = first.standardise(targets.tokens_BND)
        assert torch.allclose(targets.standardised_BND, scale, atol=1e-4)
        std = first.std_D
        assert torch.allclose(
            targets.scaled_BND, scale * std / std.square().mean().sqrt(), atol=1e-4
        )
        assert len(targets) == len(expected) == len(targets.standardised_BND)
        if expected.cls_BD is not None:
            assert torch.allclose(targets.cls_BD, expected.cls_BD, atol=1e-2)
            attention = expected.cls_attention_BHN
            assert torch.allclose(targets.cls_attention_BHN, attention, atol=1e-3)
    # the KD loss is that of the same tokens in one cache with the first one's statistics
    width = model.adapters["clip"].norm.weight.numel()
    student = torch.randn(len(batch["pixel_values"]), 36, width)
    alone = {name: one_cache(found, sources[0]) for name, found in batch["targets"].items()}
    loss, expected = (digits.kd(model, student, each) for each in (batch["targets"], alone))
    assert loss.keys() == expected.keys()
    for name, value in expected.items():
        assert loss[name].item() == pytest.approx(value.item(), rel=1e-3), name


def one_cache(targets, source):
    """Return mixed targets as if one float16 cache with the first one's statistics held them."""
    name = "clip" if targets.cls_BD is not None else "sam"
    stored = {"tokens": targets.tokens_BND.half()}
    if name == "clip":
        stored |= {"cls": targets.cls_BD, "cls_attention": targets.cls_attention_BHN}
    return TeacherTargets(stored, source.cache[name].stats, codec("float16"))


def stop_at(step):
    """Return a progress function that interrupts the run when ``step`` is done."""

    def progress(what, done, total):
        if what.startswith("train") and done == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("pretrain", ()),
        pytest.param(
            "finetune",
            ("data.packing=true", "data.model_max_length=200"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_mixture_ends_as_an_uninterrupted_one(digits, halves, tmp_path, stage, more):
    keys = (
        *halves.keys(halves.apart, (0.5, 2)),
        "training.num_train_epochs=2",
        "training.save_strategy=steps",
        "training.save_steps=3",
        *more,
    )
    said = []
    whole = digits.train(tmp_path / "whole", stage, *keys, notify=said.append)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", stage, *keys, progress=stop_at(whole.steps - 2))
    parts = digits.train(tmp_path / "parts", stage, *keys, resume=True)
    assert digits.logged(parts) == digits.logged(whole)
    first, second = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    shares = [line for line in said if "per epoch" in line]
    assert len(shares) == 2
    if not more:
        assert "12 of 44 samples per epoch (27.3%), from 24 with weight 0.5." in shares[0]
        assert "32 of 44 samples per epoch (72.7%), from 16 with weight 2." in shares[1]
        assert whole.steps == 2 * 11
    inputs = json.loads((tmp_path / "whole/inputs.json").read_text())
    assert inputs["weights"] == [0.5, 2]
    assert len(inputs["features of clip"]) == len(inputs["corpus"]) == 2
    config = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())
    assert [source["weight"] for source in config["data"]["sources"]] == [0.5, 2]
    with pytest.raises(ConfigError, match=r"another config: data\.sources differ"):
        digits.train(
            tmp_path / "parts",
            stage,
            *keys,
            *halves.keys(halves.apart, (1, 2)),
            resume=True,
        )


def test_the_encoder_learns_from_images_of_two_corpora_and_holds_some_out(digits, halves, tmp_path):
    keys = halves.keys(halves.apart, (1, 1.5), conversations=[])
    said = []
    summary = digits.train(
        tmp_path / "run",
        "distill",
        *keys,
        "data.val_size=0.2",
        "training.eval_strategy=epoch",
        notify=said.append,
    )
    num_images = [len(open_corpus(data)) for data in halves.data]
    num_held = -(-sum(num_images) // 5)
    assert any(f"{num_held} views are held out" in line for line in said)
    assert any("eval_loss_kd" in entry for entry in summary.log)


def test_held_out_files_belong_to_their_corpus(digits, halves, tmp_path):
    """A run may hold out only samples of the second corpus."""
    sources = json.loads(halves.keys(halves.shared)[-1].partition("=")[2])
    entries = json.loads(halves.conversations[1].read_text())
    path = tmp_path / "held.json"
    path.write_text(json.dumps(entries[:2]))
    sources[1]["eval_conversations"] = [str(path)]
    keys = ["data.shards=null", "data.conversations=[]", f"data.sources={json.dumps(sources)}"]
    config = digits.config("finetune", *keys, "training.eval_steps=2")
    opened = open_sources(config, None)
    _, student = build_model(config, opened[0].cache)
    data = read_data(config, opened, student)
    assert len(data.held_out) == 2
    held = [data.held_out[at] for at in range(2)]
    assert {sample.key for sample in held} == {entry["id"] for entry in entries[:2]}
    start = opened[1].image_start
    assert all(image >= start > 0 for sample in held for image in sample.images)
    assert "images of the held-out ones are trained on, too" in data.describe()


def test_other_teachers_in_one_of_the_caches_are_refused(digits, halves, digit_specs, tmp_path):
    pooled = [digit_specs[0], digit_specs[1].with_changes(grid=6)]
    list(
        build_cache(
            tmp_path / "cache",
            open_corpus(halves.data[1]),
            pooled,
            geometry="crop",
            options=BuildOptions(num_workers=0),
        )
    )
    config = digits.config("finetune", *halves.keys([halves.shared[0], tmp_path / "cache"]))
    with pytest.raises(
        CacheError, match=r"'sam' is not the same in .*: grid is 'native' .*, 6 in .*Expected one"
    ):
        train(config, tmp_path / "run")


def test_a_source_without_a_cache_takes_the_one_of_the_command(digits, halves, tmp_path):
    sources = json.loads(halves.keys(halves.shared)[-1].partition("=")[2])
    del sources[1]["cache"]
    keys = ["data.shards=null", "data.conversations=[]", f"data.sources={json.dumps(sources)}"]
    config = digits.config("finetune", *keys)
    with pytest.raises(ConfigError, match=r"no cache was given for .*finetune; add --cache"):
        open_sources(config, None)
    opened = open_sources(config, digits.cache)
    assert [source.cache.url for source in opened] == [str(halves.shared[0]), str(digits.cache)]
    assert opened[1].row_start == opened[0].cache.catalog.num_rows


def test_sources_of_one_corpus_share_it(digits, source):
    sources = [
        {"shards": str(digits.data), "conversations": [str(source / f"{part}.json")]}
        for part in PARTS
    ]
    keys = ["data.shards=null", "data.conversations=[]", f"data.sources={json.dumps(sources)}"]
    opened = open_sources(digits.config("finetune", *keys), digits.cache)
    assert opened[0].corpus is opened[1].corpus
    assert opened[0].cache is opened[1].cache
    assert [(s.image_start, s.row_start) for s in opened] == [(0, 0), (0, 0)]


def test_a_dry_run_says_what_an_epoch_takes(digits, halves, tmp_path):
    keys = (*halves.keys(halves.apart, (0.5, 2)), "data.val_size=4", "training.eval_steps=2")
    (tmp_path / "student.yaml").write_text(digits.config("finetune", *keys).to_yaml())
    command = ["train", "--config", str(tmp_path / "student.yaml"), "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    lines = [line for line in result.stderr.splitlines() if "per epoch" in line]
    assert [line.partition(" (")[0] for line in lines] == [f"movekd: {p}" for p in halves.data]
    said = [re.search(r"from (\d+) with weight", line) for line in lines]
    sizes = [int(found[1]) for found in said if found]
    assert sum(sizes) + 4 == 24 + 16  # kept and held out
    drawn = [round(sizes[0] / 2), 2 * sizes[1]]
    for line, number in zip(lines, drawn, strict=True):
        assert f"{number} of {sum(drawn)} conversations per epoch" in line
    assert "4 conversations are held out" in result.stderr
