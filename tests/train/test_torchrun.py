"""Training under torchrun: who reads what, processes that are killed, and which one speaks."""

import json
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch

from movekd.cache import open_cache
from movekd.corpus.index import open_corpus
from movekd.train.sampler import GlobalOrderSampler
from movekd.train.trainer import DistillTrainer
from s3 import s3_server, upload
from torchrun import both_processes, logged, torchrun, train_in_two_processes, training
from watched import begin_batch, noting, read_notes

IN_TWO = ("training.per_device_train_batch_size=2", "training.save_strategy=steps")
DROPOUT = ("student.mole.lora_dropout=0.3", "training.save_steps=2")


def watched(folder, die=""):
    """Return the keywords of a start of torchrun whose processes note what they do in a folder."""
    folder.mkdir()
    return {"module": "watched", "env": {"WATCH_NOTES": str(folder), "WATCH_DIE": die}}


def sentences(done):
    """Return what movekd itself said on standard error; torchrun says the rest."""
    return [line for line in done.stderr.splitlines() if line.startswith("movekd: ")]


def order(notes):
    """Return the samples of each step, in order, and the number of processes that it took."""
    batches = {}
    for number, line in enumerate(notes):  # of one process in order
        if "step" in line:
            batches.setdefault(line["step"], []).append((line["rank"], number, line))
    steps = {}
    for step, lines in sorted(batches.items()):
        shares = {}
        for rank, _, line in sorted(lines, key=lambda entry: entry[:2]):
            shares.setdefault(rank, []).append(line["keys"])
        turns = zip(*shares.values(), strict=True)  # the processes take turns at micro-batches
        keys = [key for turn in turns for batch in turn for key in batch]
        steps[step] = (keys, lines[0][2]["world"])
    return steps


def assert_same_weights(digits, first, second):
    one, two = digits.weights(first), digits.weights(second)
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """A run of six steps in two processes, with dropout, and what its processes noted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = digits.config("pretrain", *IN_TWO, *DROPOUT)
    words = training(config, folder / "run", digits.cache)
    done = torchrun(*words, **watched(folder / "notes"))
    assert done.returncode == 0, done.stderr
    return folder / "run", read_notes(folder / "notes")


def test_each_process_reads_its_own_samples_alone(digits, undisturbed):
    _, notes = undisturbed
    entries = json.loads((digits.source / "pretrain.json").read_text())
    names = [entry["image"] for entry in entries]
    for kind, expected in (
        ("image", open_corpus(digits.data).rows(names)),
        ("rows", open_cache(digits.cache).rows(names)),
    ):
        read = [
            sorted(row for n in notes if n["rank"] == rank for row in as_list(n.get(kind)))
            for rank in range(2)
        ]
        assert all(read)
        assert not set(read[0]) & set(read[1])
        times = 1 if kind == "image" else 2  # teachers
        assert sorted(read[0] + read[1]) == sorted(expected.tolist() * times)


def as_list(value):
    return [] if value is None else [value] if isinstance(value, int) else value


def test_the_order_of_samples_is_the_global_one(digits, undisturbed):
    _, notes = undisturbed
    entries = json.loads((digits.source / "pretrain.json").read_text())
    ids = [entries[position]["id"] for position in GlobalOrderSampler(24, 0)]
    expected = {step + 1: (ids[4 * step : 4 * step + 4], 2) for step in range(6)}
    assert order(notes) == expected


def test_a_killed_process_started_again_by_torchrun_ends_bit_for_bit_the_same(
    digits, undisturbed, tmp_path
):
    """Into the folder of another run, with --overwrite: the restart must delete nothing.

    A process that is killed says nothing. torchrun then stops the other one, which may or may not
    have noticed before; the sentence that it owes is the next test's. It dies in the second step
    after a checkpoint, because only then has the other process finished writing that.
    """
    whole, _ = undisturbed
    digits.train(tmp_path / "run", "pretrain", "training.max_steps=1")
    config = digits.config("pretrain", *IN_TWO, *DROPOUT)
    done = torchrun(
        *training(config, tmp_path / "run", digits.cache),
        "--overwrite",
        options=("--max-restarts", "1"),
        **watched(tmp_path / "notes", die="1:6"),
    )
    assert done.returncode == 0, done.stderr
    said = sentences(done)
    assert len(said) <= 1
    assert all("another process of this run has ended" in sentence for sentence in said)
    assert "Traceback" not in done.stderr
    again = [line for line in read_notes(tmp_path / "notes") if line["attempt"] == 1]
    assert sorted({line["step"] for line in again if "step" in line}) == [5, 6]
    assert sum("image" in line for line in again) == 8  # nor is a sample read that is skipped
    assert_same_weights(digits, whole, tmp_path / "run")
    timed = ("runtime", "per_second", "peak_gib")
    for first, second in zip(logged(whole), logged(tmp_path / "run"), strict=True):
        for name in first:
            assert name.endswith(timed) or first[name] == second[name], name


def test_who_loses_a_process_says_so_in_one_sentence(digits, tmp_path):
    """Two processes that nobody watches over: torchrun might stop the other before it speaks."""
    words = training(digits.config("pretrain", *IN_TWO), tmp_path / "run", digits.cache)
    noted = watched(tmp_path / "notes", die="1:2")
    done = both_processes(*words, module=noted["module"], env=noted["env"])
    assert [process.returncode for process in done] == [2, -signal.SIGKILL]
    (sentence,) = sentences(done[0])
    assert "another process of this run has ended" in sentence
    assert "Give --resume to continue from the last checkpoint" in sentence
    assert "Traceback" not in done[0].stderr
    assert sentences(done[1]) == []


def test_another_number_of_processes_goes_on_at_the_same_sample(digits, tmp_path, monkeypatch):
    """Two processes, of which one meets a damaged image, then one alone: as one from the beginning.

    Plain SGD without dropout, so that the weights differ by what float32 loses where the same
    gradients are added up in another order: about 1e-7 of them a sum, far below 1e-5 in a few
    steps. (AdamW divides a gradient by its own size, rounding errors of vanishing ones included.)
    """
    shutil.copytree(digits.data, tmp_path / "data")
    keys = (
        f"data.shards={tmp_path / 'data'}",
        "student.mole.balance_weight=0",  # the balance loss is taken a micro-batch
        "training.data_seed=1",  # an image of step 4 that comes once
        "training.optim=sgd",
        "training.learning_rate=0.1",
        "training.save_strategy=steps",
        "training.save_steps=1",
    )
    config = digits.config("finetune", *keys, *IN_TWO)
    _, _, dataset, _ = digits.parts(config)
    sampler = GlobalOrderSampler(
        16, 1, global_batch_size=4, lengths=dataset.modality_lengths(), micro_batch_size=2
    )
    samples = [dataset.conversations[position] for position in sampler]
    (name,) = samples[14].images  # process 1 reads it with step 3 under way
    assert name not in [image for sample in samples[:14] for image in sample.images]
    with damaged(tmp_path / "data", name) as key:
        noted = watched(tmp_path / "notes")
        done = torchrun(*training(config, tmp_path / "run", digits.cache), **noted)
    assert done.returncode == 1
    (sentence,) = sentences(done)
    assert sentence.startswith(f"movekd: image {key} of ")
    assert done.stderr.count("Traceback") == 1  # torchrun's own

    (tmp_path / "more").mkdir()
    monkeypatch.setenv("WATCH_NOTES", str(tmp_path / "more"))
    compute_loss = noting(DistillTrainer.compute_loss, begin_batch)
    monkeypatch.setattr(DistillTrainer, "compute_loss", compute_loss)
    digits.train(tmp_path / "run", "finetune", *keys, *IN_TWO, resume=True)
    before, after = (order(read_notes(tmp_path / folder)) for folder in ("notes", "more"))
    ids = [sample.id for sample in samples]
    expected = {step + 1: (ids[4 * step : 4 * step + 4], 2 - step // 2) for step in range(4)}
    assert {step: before[step] for step in (1, 2)} | after == expected

    whole = digits.train(tmp_path / "whole", "finetune", *keys)
    for one, other in zip(digits.logged(whole), logged(tmp_path / "run"), strict=True):
        for name in ("loss_text", "loss_kd", "grad_norm", "learning_rate"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    weights, found = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "run")
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=0, atol=1e-5, msg=name)


@contextmanager
def damaged(data, name):
    """Put zeros where an image lies, and in the end the image again; yield its key."""
    corpus = open_corpus(data)
    (row,) = corpus.rows([name])
    image = corpus.index.slice(row, 1).to_pylist()[0]
    content = corpus.read_image(row)
    for written in (bytes(len(content)), content):
        with (data / image["shard"]).open("r+b") as shard:
            shard.seek(image["offset"])
            shard.write(written)
        if written != content:
            yield image["key"]


def test_a_cache_in_s3_gives_two_processes_the_same(digits, undisturbed, tmp_path):
    whole, notes = undisturbed
    config = digits.config("pretrain", *IN_TWO, *DROPOUT)
    with s3_server():
        upload(digits.cache, "s3://bucket/cache")
        noted = watched(tmp_path / "notes")
        train_in_two_processes(config, tmp_path / "run", "s3://bucket/cache", **noted)
    assert_same_weights(digits, whole, tmp_path / "run")
    assert read_notes(tmp_path / "notes") == notes


def test_what_all_processes_must_refuse_is_one_sentence(digits, undisturbed):
    """The first process looks into the folder, the others hear of it; a new start is no restart."""
    whole, _ = undisturbed
    before = digits.weights(whole)
    config = digits.config("pretrain", *IN_TWO, *DROPOUT)
    done = torchrun(*training(config, whole, digits.cache))
    assert done.returncode == 1
    assert sentences(done) == [
        f"movekd: {whole} holds a run already; give --resume to continue it, --overwrite to "
        "delete it, or another --output."
    ]
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert done.stdout == ""
    after = digits.weights(whole)
    assert all(torch.equal(before[name], after[name]) for name in before)
