"""Tests of training LLaVA-NeXT: tiles in, targets of the base view or of all views."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from movekd.cache import open_cache
from movekd.corpus.index import open_corpus
from movekd.distill.objective import count_units
from movekd.errors import ConfigError
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.student.vlm import image_features
from movekd.train.datasets import read_data
from movekd.train.evaluation import held_out_loader, held_out_losses
from movekd.train.run import build_model, train
from movekd.train.sources import Source
from movekd.train.training_args import training_arguments
from same_step import assert_same_step, one_by_one, packed
from torchrun import train_in_two_processes

NUM_VIEWS = [3, 5, 4, 4, 3, 3, 5]
"""Of the seven images of ``view_corpora``."""


@pytest.fixture(scope="module")
def next_digits(digits, view_corpora, tiny_specs, tmp_path_factory):
    """Return a function to a run of LLaVA-NeXT on seven images, and caches of both kinds."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("next")
    tower = CLIPVisionConfig(
        hidden_size=144,  # as the anchor's, which the official recipe compares as it is
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=336,
        patch_size=84,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    LlavaNextImageProcessorPil().save_pretrained(folder / "tower")
    entries = []
    for number in (*range(7), None):
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a 3 and a 7"}]
        entry = {"id": f"of-{number}", "image": f"{number}.png", "conversations": turns}
        if number is None:
            turns[0]["value"] = "What is the sum of 1, 2?"
            del entry["image"]
        entries.append(entry)
    (folder / "pretrain.json").write_text(json.dumps(entries[:-1]))
    (folder / "finetune.json").write_text(json.dumps(entries))
    corpus = open_corpus(view_corpora[0])
    options = BuildOptions(batch_size=4, num_workers=0)
    for views in ("base", "anyres"):
        channel_stats = None if views == "base" else folder / "base"
        list(
            build_cache(
                folder / views,
                corpus,
                tiny_specs,
                geometry="stretch",
                views=views,
                options=options,
                channel_stats=channel_stats,
            )
        )

    def config(stage="pretrain", *overrides):
        keys = [
            f"data.shards={view_corpora[0]}",
            "distill.teachers=[clip, conv]",
            "student.architecture=llava_next",
            f"student.vision_tower={folder / 'tower'}",
            "training.per_device_train_batch_size=2",
        ]
        if stage != "distill":
            keys.append(f"data.conversations=[{folder / stage}.json]")
        return digits.config(stage, *keys, *overrides)

    return config, folder


def parts(digits, next_digits, views="base", *overrides):
    """Return the model, its corpus' cache, the data set and the collator."""
    config, folder = next_digits
    run = config("finetune", f"distill.views={views}", *overrides)
    model, _, dataset, collator = replace(digits, cache=folder / "anyres").parts(run)
    return model.eval(), open_cache(folder / "anyres"), dataset, collator


def test_the_base_view_is_distilled_and_all_views_are_seen(digits, next_digits):
    model, cache, dataset, collator = parts(digits, next_digits)
    samples = [dataset[position] for position in (1, 0, 2)]
    batch = collator(samples)
    batch.pop("keys")
    assert len(batch["pixel_values"]) == 5 + 3 + 4
    assert batch["target_views"].tolist() == [0, 5, 8]
    assert [sample.rows for sample in samples] == [[3], [0], [8]]
    terms = digits.terms(model, batch)
    assert count_units(batch)[1] == 3
    with torch.no_grad():
        base_IND = torch.cat(
            [image_features_of_a_view(model, batch["pixel_values"][v]) for v in (0, 5, 8)]
        )
    names = [f"{number}.png" for number in (1, 0, 2)]
    targets = {name: cache[name].read(cache.rows(names)) for name in ("clip", "conv")}
    expected = digits.kd(model, base_IND, targets)["kd"]
    torch.testing.assert_close(terms["kd"], expected, rtol=1e-4, atol=1e-5)


def image_features_of_a_view(model, pixels_CHW):
    """Return the student's tokens of one view, by the tower itself."""
    tower = model.vlm.model.vision_tower
    return tower(pixels_CHW[None], output_hidden_states=True).hidden_states[-2][:, 1:]


def test_all_views_are_distilled_where_the_cache_has_them(digits, next_digits):
    model, cache, dataset, collator = parts(digits, next_digits, "all")
    batch = collator([dataset[position] for position in (1, 7, 0)])  # 7 has no image
    batch.pop("keys")
    assert batch["target_views"] is None
    terms = digits.terms(model, batch)
    assert count_units(batch)[1] == 8
    rows = [int(cache.rows([f"{n}.png"], v)[0]) for n in (1, 0) for v in range(NUM_VIEWS[n])]
    assert rows == [3, 4, 5, 6, 7, 0, 1, 2]
    targets = {name: cache[name].read(rows) for name in ("clip", "conv")}
    with torch.no_grad():
        views_VND = torch.cat(
            [image_features_of_a_view(model, pixels) for pixels in batch["pixel_values"]]
        )
    expected = digits.kd(model, views_VND, targets)["kd"]
    torch.testing.assert_close(terms["kd"], expected, rtol=1e-4, atol=1e-5)


def test_text_is_the_loss_of_transformers_own_way_in(digits, next_digits):
    model, _, dataset, collator = parts(digits, next_digits)
    batch = collator([dataset[4]])
    labels = batch["labels"]
    padded = {"pixel_values": batch["pixel_values"][None], "image_sizes": batch["image_sizes"]}
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mean = model.vlm(**ids, **padded, labels=labels).loss
    batch.pop("keys")
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(
        digits.terms(model, batch)["text"] / count, mean, rtol=1e-4, atol=1e-5
    )


def test_text_only_batches_give_zero_gradients_not_none(digits, next_digits):
    model, _, dataset, collator = parts(digits, next_digits)
    batch = collator([dataset[7]])
    batch.pop("keys")
    assert batch["pixel_values"] is None
    terms = digits.terms(model, batch)
    (terms["text"] + terms["kd"]).backward()
    newline = model.vlm.model.image_newline
    for parameter in (newline, *model.vlm.model.multi_modal_projector.parameters()):
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize(
    ("views", "recipe"), [("base", "revised"), ("all", "revised"), ("all", "official")]
)
def test_both_stages_run_and_a_resumed_run_ends_as_an_uninterrupted_one(
    digits, next_digits, tmp_path, views, recipe
):
    config, folder = next_digits
    cache = folder / ("anyres" if views == "all" else "base")
    keys = (f"recipe={recipe}", "distill.grid=student", f"distill.views={views}")
    saving = ("training.save_strategy=steps", "training.save_steps=1")
    run = config("pretrain", *keys, *saving)
    whole = train(run, tmp_path / "whole", cache, allow_random_teachers=True)
    assert whole.steps == 4

    def stop(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "parts", cache, allow_random_teachers=True, progress=stop)
    train(run, tmp_path / "parts", cache, allow_random_teachers=True, resume=True)
    one, two = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "mm_projector.safetensors/model.image_newline" in one
    begin = f"init_from={tmp_path / 'whole'}"
    run = config("finetune", *keys, begin, "training.max_steps=1", "training.learning_rate=0")
    train(run, tmp_path / "finetune", cache, allow_random_teachers=True)
    after = digits.weights(tmp_path / "finetune")
    assert all(torch.equal(one[name], after[name]) for name in one)


def test_two_processes_equal_one(digits, next_digits, tmp_path):
    """Images of three to five views, all distilled, and in one step a process without an image.

    Plain SGD: weights differ by what float32 loses in sums of another order.
    """
    config, folder = next_digits
    keys = (
        "distill.grid=student",
        "distill.views=all",
        "distill.summary_weight=0.5",
        "student.mole.balance_weight=0",  # taken a micro-batch
        "training.optim=sgd",
        "training.learning_rate=0.1",
    )
    cache = folder / "anyres"
    single = train(config("finetune", *keys), tmp_path / "one", cache, allow_random_teachers=True)
    halves = config("finetune", *keys, "training.per_device_train_batch_size=1")
    two = train_in_two_processes(halves, tmp_path / "two", cache, "--allow-random-teachers")
    assert single.steps == 4
    for expected, found in zip(digits.logged(single), two, strict=True):
        for name in ("loss_text", "loss_kd", "loss_kd_conv", "loss_summary", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    expected, found = digits.weights(tmp_path / "one"), digits.weights(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("views", ["base", "all"])
def test_packed_rows_with_tiles_are_the_step_of_their_conversations(digits, next_digits, views):
    keys = ("data.packing=true", "student.mole=null", "trained=[projector, language_model]")
    model, _, dataset, collator = parts(digits, next_digits, views, *keys, "distill.grid=student")
    rows = packed(dataset)
    assert len(rows) < len(dataset) / 2
    batch = collator([rows[row] for row in range(len(rows))])
    assert len(batch["image_sizes"]) == 7
    assert_same_step(model, [batch], [collator([sample]) for sample in one_by_one(rows)])


@pytest.mark.parametrize("views", ["base", "all"])
def test_held_out_losses_are_means_over_the_views_with_targets(digits, next_digits, views):
    config, folder = next_digits
    keys = (f"distill.views={views}", "distill.grid=student", "data.val_size=4")
    run = config("finetune", *keys, "training.eval_steps=1")
    cache = open_cache(folder / "anyres")
    model, student = build_model(run, cache)
    (keys,) = run.data.all_sources()
    data = read_data(run, [Source(keys, open_corpus(run.data.shards), cache)], student)
    arguments = training_arguments(run, folder)
    loader = held_out_loader(data.held_out, data.collator, arguments)
    found = held_out_losses(model, loader, lambda batch: batch, arguments)
    sums, num_views = {"kd": 0.0, "kd_conv": 0.0}, 0
    for position in range(len(data.held_out)):
        batch = data.collator([data.held_out[position]])
        batch.pop("keys")
        num_views += int(count_units(batch)[1])
        terms = digits.terms(model.eval(), batch)
        sums = {name: total + terms[name].item() for name, total in sums.items()}
    assert num_views > (4 if views == "all" else 2)
    for name, total in sums.items():
        assert found[f"eval_loss_{name}"] == pytest.approx(total / num_views, rel=1e-5)


def test_stage_distill_takes_every_view(digits, next_digits, tmp_path):
    config, folder = next_digits
    keys = ("distill.views=all", "training.max_steps=1")
    for architecture in ("llava", "llava_next"):
        chosen = (f"student.architecture={architecture}", "data.geometry=stretch")
        run = config("distill", *keys, *chosen)
        train(run, tmp_path / architecture, folder / "anyres", allow_random_teachers=True)
    run = config("distill", *keys)
    _, _, dataset, collator = replace(digits, cache=folder / "anyres").parts(run)
    assert len(dataset) == sum(NUM_VIEWS)
    corpus, cache = open_corpus(run.data.shards), open_cache(folder / "anyres")
    for position in (0, 2, 4, 26):
        sample = dataset[position]
        assert cache.rows([sample.key], sample.view)[0] == sample.row
        batch = collator([sample])
        expected = collator.transform(corpus.read_image(sample.image), sample.view)
        assert torch.equal(batch["pixel_values"][0], torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("overrides", "cache", "message"),
    [
        (("distill.views=all",), "base", r"views is 'all', but .*base views only.*--tiles anyres"),
        (("data.geometry=pad",), "base", r"geometry is 'pad', but the base view.*stretch"),
        (
            ("distill.views=all", "student.architecture=llava"),
            "anyres",
            r"views is 'all', but .*architecture: llava looks only at the whole image",
        ),
    ],
)
def test_what_does_not_fit_is_refused(next_digits, tmp_path, overrides, cache, message):
    config, folder = next_digits
    with pytest.raises(ConfigError, match=message):
        train(config("pretrain", *overrides), tmp_path, folder / cache, allow_random_teachers=True)


def test_image_features_agree_with_transformers_on_which_views_there_are(digits, next_digits):
    model, _, dataset, collator = parts(digits, next_digits)
    batch = collator([dataset[position] for position in range(7)])
    output, tokens_VND = image_features(model.vlm, batch["pixel_values"], batch["image_sizes"])
    assert len(tokens_VND) == sum(NUM_VIEWS)
    image_id = dataset.tokenizer.convert_tokens_to_ids("<image>")
    counts = [dataset[position].input_ids.count(image_id) for position in range(7)]
    assert [len(features) for features in output.pooler_output] == counts
