"""Training under torchrun: who reads what, processes that are killed, and how many of them speak."""

import json
import shutil

import pytest
import torch
from torchrun import logged, torchrun, train_in_two_processes, training
from watched import read_notes

from movekd.cache import open_cache
from movekd.corpus.index import open_corpus
from movekd.train.sampler import GlobalOrderSampler

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


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """A run of six steps in two processes, with dropout, and what its processes noted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = digits.config("pretrain", *IN_TWO, *DROPOUT)
    train_in_two_processes(config, folder / "run", digits.cache, **watched(folder / "notes"))
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
    """Into the folder of another run, with --overwrite: the restart must delete nothing."""
    whole, _ = undisturbed
    digits.train(tmp_path / "run", "pretrain", "training.max_steps=1")
    config = digits.config("pretrain", *IN_TWO, *DROPOUT)
    done = torchrun(
        *training(config, tmp_path / "run", digits.cache),
        "--overwrite",
        options=("--max-restarts", "1"),
        **watched(tmp_path / "notes", die="1:5"),
    )
    assert done.returncode == 0, done.stderr
    (sentence,) = sentences(done)
    assert "another process of this run has ended" in sentence
    assert "Traceback" not in done.stderr
    again = [line for line in read_notes(tmp_path / "notes") if line["attempt"] == 1]
    assert sorted({line["step"] for line in again if "step" in line}) == [5, 6]
    assert sum("image" in line for line in again) == 8  # nor is a sample read that is skipped
    one, two = digits.weights(whole), digits.weights(tmp_path / "run")
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]
    timed = ("runtime", "per_second")
    for first, second in zip(logged(whole), logged(tmp_path / "run"), strict=True):
        for name in first:
            assert name.endswith(timed) or first[name] == second[name], name


def test_another_number_of_processes_goes_on_at_the_same_sample(digits, tmp_path):
    """Two processes, one killed in step 3, then one alone: as one alone from the beginning.

    Plain SGD without dropout, so that the weights differ by what float32 loses where the same
    gradients are added up in another order: about 1e-7 of them a sum, far below 1e-5 in a few
    steps. (AdamW divides a gradient by its own size, rounding errors of vanishing ones included.)
    """
    keys = (
        "student.mole.balance_weight=0",  # the balance loss is taken a micro-batch
        "training.optim=sgd",
        "training.learning_rate=0.1",
        "training.save_strategy=steps",
        "training.save_steps=1",
    )
    whole = digits.train(tmp_path / "whole", "finetune", *keys)
    config = digits.config("finetune", *keys, *IN_TWO)
    words = training(config, tmp_path / "run", digits.cache)
    done = torchrun(*words, **watched(tmp_path / "notes", die="1:3"))
    assert done.returncode == 1
    assert len(sentences(done)) == 1
    alone = torchrun(*words, "--resume", processes=1, **watched(tmp_path / "more"))
    assert alone.returncode == 0, alone.stderr
    before, after = order(read_notes(tmp_path / "notes")), order(read_notes(tmp_path / "more"))
    for one, other in zip(digits.logged(whole), logged(tmp_path / "run"), strict=True):
        for name in ("loss_text", "loss_kd", "grad_norm", "learning_rate"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    expected, found = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "run")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)


def test_bad_input_is_one_sentence_of_all_processes(digits, tmp_path):
    """Also where torchrun tries again; the last words are its own."""
    words = training(digits.config("pretrain"), tmp_path / "run", digits.cache)
    done = torchrun(*words, "--set", "distill.kd_weigth=1", options=("--max-restarts", "1"))
    assert done.returncode == 1
    (sentence,) = sentences(done)
    assert "Did you mean 'kd_weight'?" in sentence
    assert done.stdout == ""


def test_what_one_process_alone_meets_is_one_sentence(digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits.data, data)
    entries = json.loads((digits.source / "pretrain.json").read_text())
    name = entries[list(GlobalOrderSampler(24, 0))[6]]["image"]  # process 1 sees it in step 2
    corpus = open_corpus(data)
    (row,) = corpus.rows([name])
    image = corpus.index.slice(row, 1).to_pylist()[0]
    with (data / image["shard"]).open("r+b") as shard:
        shard.seek(image["offset"])
        shard.write(bytes(image["size"]))
    config = digits.config("pretrain", *IN_TWO, f"data.shards={data}")
    done = torchrun(*training(config, tmp_path / "run", digits.cache))
    assert done.returncode == 1
    (sentence,) = sentences(done)
    assert image["key"][:8] in sentence
