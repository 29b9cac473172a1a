"""Runs that differ only in their seeds are one arm; others are named by the keys that differ."""

import json
import shutil

import pytest
import yaml

from movekd.errors import ConfigError
from movekd.train.run_record import lock_run
from movekd.view.arms import group_runs, read_compared
from sweep import entries, pack_one, write_compared

LOG = entries([2.0, 1.0])
SMALL = ("student.mole.r=8",)


def group(*given):
    return group_runs([read_compared(str(one)) for one in given])


@pytest.fixture
def write(tmp_path, corpus_dir):
    """Return a function that writes a finished run, by name, seed and overrides."""

    def write(name, seed=0, *overrides, corpus=corpus_dir, **kwargs):
        return write_compared(tmp_path / name, corpus, seed, *overrides, log=LOG, **kwargs)

    return write


def test_seeds_logging_and_places_make_no_arm(write, tmp_path, corpus_dir):
    shutil.copytree(corpus_dir, tmp_path / "moved")
    runs = [
        write("a", 0),
        write("b", 1, "training.logging_steps=7", "training.report_to=none"),
        write("c", 2, "training.data_seed=9", "training.dataloader_num_workers=1"),
        write("d", 3, corpus=tmp_path / "moved"),
    ]
    keys, (arm,) = group(*runs)
    assert keys == []
    assert arm.name == "a"
    assert [run.seed for run in arm.runs] == ["0", "1", "2 (data 9)", "3"]
    assert arm.mixed == []


def test_of_several_corpora_the_weights_make_an_arm_and_the_places_none(
    write, tmp_path, corpus_dir
):
    shutil.copytree(corpus_dir, tmp_path / "moved")
    file = tmp_path / "texts.json"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    file.write_text(json.dumps([{"id": "0", "conversations": turns}]))

    def sources(weight, *places):
        found = [
            {"shards": str(place), "conversations": [str(file)], "weight": weight}
            for place in places
        ]
        return ("data.shards=null", f"data.sources={json.dumps(found)}")

    runs = [
        write("a", 0, *sources(2, corpus_dir, corpus_dir)),
        write("b", 1, *sources(2, corpus_dir, tmp_path / "moved")),
        write("c", 0, *sources(3, corpus_dir, corpus_dir)),
    ]
    keys, arms = group(*runs)
    assert keys == ["data.sources.weight"]
    assert [[run.seed for run in arm.runs] for arm in arms] == [["0", "1"], ["0"]]
    assert [list(arm.cells) for arm in arms] == [["2, 2"], ["3, 3"]]


def test_only_differing_keys_are_shown_by_their_yaml_names(write):
    runs = [
        write("a", 0),
        write("b", 0, "student.mole.r=8"),
        write("c", 0, "student.mole.r=8", "training.weight_decay=0.1"),
        write("d", 0, "student.mole=null"),
    ]
    keys, arms = group(*runs)
    table = {arm.name: dict(zip(keys, arm.cells, strict=True)) for arm in arms}
    assert keys == [
        *("student.mole", "student.mole.lora_alpha", "student.mole.r"),
        *("trained", "training.weight_decay"),
    ]
    assert [arm["student.mole.r"] for arm in table.values()] == ["16", "8", "8", "-"]
    assert [arm["student.mole"] for arm in table.values()] == ["given"] * 3 + ["null"]
    assert [arm["training.weight_decay"] for arm in table.values()] == [
        *("not set", "not set", "0.1", "not set")
    ]
    assert "r=8" in list(table)[1]
    assert "weight_decay=0.1" in list(table)[2]
    assert "mole=null" in list(table)[3]
    assert len(table) == 4


def test_the_names_of_arms_do_not_depend_on_the_order(write):
    runs = [write("a", 0), write("b", 0, "student.mole.r=8"), write("c", 1)]
    assert {arm.name for arm in group(*runs)[1]} == {arm.name for arm in group(*runs[::-1])[1]}


def test_another_corpus_is_another_arm(write, tmp_path, crops):
    other = pack_one(crops[0], tmp_path / "other")
    keys, arms = group(write("a"), write("b", corpus=other))
    assert keys == ["data.conversations", "data.shards"]
    cells = [arm.cells[1] for arm in arms]
    assert [len(cell) for cell in cells] == [8, 8]
    assert [arm.name.rpartition("shards=")[2] for arm in arms] == cells


def test_another_number_of_samples_per_step_is_another_arm(write):
    keys, arms = group(write("a"), write("b", per_step=8))
    assert keys == ["samples per step"]
    assert [arm.name for arm in arms] == ["samples per step=4", "samples per step=8"]


def test_stages_are_compared_by_the_config_of_the_stage_before(write):
    runs = [write(f"a{s}", s, f"init_from={write(f'pre{s}', s)}") for s in (0, 1)]
    runs += [write(f"b{s}", s, f"init_from={write(f'small{s}', s, *SMALL)}") for s in (0, 1)]
    keys, arms = group(*runs)
    assert keys == ["init_from.student.mole.lora_alpha", "init_from.student.mole.r"]
    assert [[run.seed for run in arm.runs] for arm in arms] == [["0", "1"], ["0", "1"]]


def test_a_key_that_differs_in_both_stages_is_listed_once(write):
    pre, small = write("pre", 0), write("small", 0, *SMALL)
    runs = [write("a", 0, f"init_from={pre}"), write("b", 0, f"init_from={small}", *SMALL)]
    assert group(*runs)[0] == ["student.mole.lora_alpha", "student.mole.r"]


def test_the_seeds_of_all_stages_make_the_pair(write):
    runs = [write("a", 1, f"init_from={write('pre', 0)}"), write("b", 1)]
    assert [read_compared(str(run)).seed for run in runs] == ["1 after 0", "1"]


def test_an_earlier_stage_that_is_gone_is_compared_by_its_path(write):
    runs = [write(f"a{s}", s, f"init_from={write(f'pre{s}', s)}") for s in (0, 1)]
    for seed in (0, 1):
        shutil.rmtree(runs[seed].parent / f"pre{seed}")
    assert group(*runs)[0] == ["init_from"]


def test_a_run_of_an_older_version_gets_the_defaults_of_newer_keys(write):
    old = write("old", 0)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["learning_rates"], config["data"]["packing"], config["loss_terms"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert group(old, write("new", 1))[0] == []


def test_runs_of_one_given_name_are_one_arm_which_says_what_else_differs(write):
    a, b = write("a", 0), write("b", 1, "student.mole.r=8")
    keys, (arm, other) = group(f"mixed={a}", f"mixed={b}", write("c", 0, "student.mole.r=4"))
    assert arm.name == "mixed"
    assert arm.mixed == ["student.mole.lora_alpha", "student.mole.r"]
    assert arm.cells[keys.index("student.mole.r")] == "16 | 8"
    assert other.name == "lora_alpha=16, r=4"


def test_a_folder_with_an_equals_sign_is_a_folder(write):
    assert read_compared(str(write("lr=1"))).arm is None


def test_a_folder_is_taken_once_per_arm(write):
    run = write("a")
    with pytest.raises(ConfigError, match=r"given twice.*a=.* b="):
        group(run, run.parent / "." / run.name)
    assert len(group(f"a={run}", f"b={run}")[1]) == 2


@pytest.mark.parametrize("given", ["{}", "name={}"])
def test_a_folder_that_is_no_run_names_itself(tmp_path, given):
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no config.yaml"):
        read_compared(given.format(tmp_path))


def test_the_state_of_a_run(write, tmp_path, corpus_dir):
    assert read_compared(str(write("a"))).state == "finished"
    run = write_compared(tmp_path / "begun", corpus_dir, 0)
    assert read_compared(str(run)).state == "interrupted"
    with lock_run(run):
        assert read_compared(str(run)).state == "training"
    assert read_compared(str(run)).state == "interrupted"
    (run / ".movekd-train.lock").write_text("pid 1 on elsewhere")  # of a process that was killed
    assert read_compared(str(run)).state == "interrupted"
