"""A run of each arm at tiny sizes. The queue resumes, runs the final pass once, limits trials."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import demo
import study.plan
import study.summary
from study import explore, page, plan_twelve, results, twelve_report
from study.plan import CODEC_ARMS, CODECS, SHIPPED_CACHE, SMOKE, RunId, arms, find_arm
from study.queue import Place, run_all, run_and_test_all, run_final, time_factor
from study.run import (
    CURVES,
    Task,
    cache_figures,
    execute,
    execute_and_test,
    mutual_information,
    settings,
)
from study.worlds import World, build, collect_weights, write_scenes

EVERY_ARM = (*arms(everything=True), *CODEC_ARMS, *plan_twelve.ARMS)


def test_mutual_information_by_hand():
    even = torch.ones(3, 4)
    sure = torch.tensor([[6.0, 0, 0, 0], [0, 6, 0, 0], [0, 0, 3, 3]])  # 12, 12 and 3 + 3 of 18
    found = mutual_information(torch.stack([even, sure]))
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert found[1] == pytest.approx(torch.tensor(3.0).log2().item())


def row_of(arm, seed, seconds):
    timed = {"pretrain": seconds, "finetune": 2 * seconds}
    return {"arm": arm, "world": 0, "seed": seed, "cpu_seconds": timed, "epochs": 1.7}


def test_a_time_is_matched_by_the_median_ratio_of_pairs():
    rows = [row_of("none_mole", seed, 10.0) for seed in range(3)]
    rows += [row_of("revised_mole", seed, 10.0 * ratio) for seed, ratio in enumerate((1.2, 2, 1))]
    rows.append(row_of("revised_mole", 7, 1000.0))  # without a pair
    have = results.by_run(rows)
    assert time_factor(have, find_arm("time_mole"), {}) == 1.2
    assert time_factor(have, find_arm("float16"), {}) == 1
    one = row_of("time_mole", 0, 10.0)  # all runs of an arm train as long as its first
    assert time_factor({**have, results.run_id(one): one}, find_arm("time_mole"), {}) == 1.7
    with pytest.raises(SystemExit, match=r"as long as 'revised_full', which has no row yet"):
        time_factor(have, find_arm("time_full"), {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """World 0 at tiny sizes, with all its caches."""
    made = World(0, tmp_path_factory.mktemp("study"), SMOKE)
    collect_weights(made)
    write_scenes(made)
    for name in (*study.plan.CACHES, *study.plan.DERIVED):
        build(made, name)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("arm", EVERY_ARM, ids=lambda arm: f"{arm.name}-{arm.worlds[-1]}")
def test_an_arm_runs(world, arm):
    row, curves = execute(Task(RunId(0, 0, arm.name), arm, world))
    assert row["val"]["all"][1] == SMOKE.num_val
    assert sum(asked for _, asked in row["val"].values()) == 2 * SMOKE.num_val
    assert (row["loss_kd"] is None) is (arm.cache is None)
    assert row["token_std"][1] > 0
    assert 1 <= row["token_rank"][1] <= 96
    assert ("routing" in row) is arm.has_experts
    if arm.has_experts:
        patches = 36 * SMOKE.num_val
        counted = torch.tensor(curves["routing"]["digit"]).sum((1, 2))
        assert set(counted.tolist()) == {patches}
        places = torch.tensor(curves["routing"]["place"]).sum(1)
        assert set(places.flatten().tolist()) == {SMOKE.num_val}
    steps = len(curves["finetune"]["step"])
    assert steps == 2
    assert all(len(curves["finetune"].get(name, [0] * steps)) == steps for name in CURVES)


@pytest.mark.slow
def test_students_of_main_arms_answer_unseen_looks_and_are_probed(world):
    arm = find_arm("revised_mole", plan_twelve.ARMS)
    _, _, tested = execute_and_test(Task(RunId(0, 0, arm.name), arm, world))
    for part in ("test", "clutter", "noise"):
        assert tested[part]["all"][1] == SMOKE.num_test
    assert set(tested["probe"]) == set(twelve_report.PROBES)
    assert {asked for _, asked in tested["probe"].values()} == {SMOKE.num_probe}
    plain = replace(arm, is_main=False)
    _, _, tested = execute_and_test(Task(RunId(0, 0, arm.name), plain, world))
    assert not {"clutter", "probe"} & set(tested)
    assert tested["settings"] != settings(arm, world)


def test_the_teachers_time_counts_where_an_arm_says_so(tmp_path):
    world = World(0, tmp_path, SMOKE)
    (world.folder / "weights").mkdir(parents=True)
    (world.folder / "caches").mkdir()
    trained = {name: {"seconds": 100} for name in (*demo.TEACHERS, "language_model")}
    (world.folder / "weights/training.json").write_text(json.dumps(trained))
    (world.folder / "caches" / f"{SHIPPED_CACHE}.seconds").write_text("50.0\n")
    have = results.by_run([row_of("none_mole", 0, 10.0), row_of("revised_mole", 0, 15.0)])
    plain, counted = (
        replace(find_arm(name, plan_twelve.ARMS), worlds=(0,))
        for name in ("time_mole", "time_teachers")
    )
    assert time_factor(have, plain, {0: world}) == 1.5
    assert time_factor(have, counted, {0: world}) == (3 * 15 + 4 * 100 + 50) / (3 * 10)
    elsewhere = replace(counted, worlds=(1,))
    with pytest.raises(SystemExit, match="which has no row yet"):
        time_factor(have, elsewhere, {0: world})


@pytest.mark.slow
def test_rows_become_smaller_codec_by_codec(world):
    sizes, energies = [], []
    # beside its bits lloyd4 has 8 bytes per token, int4 has 2 per 32 channels: more, below 128
    by_size = ("int8", "lloyd4", "int4", *CODECS[3:])
    assert set(by_size) == set(CODECS)
    for codec in by_size:
        figures = cache_figures(world.cache(f"recoded_{codec}"))
        assert set(figures) == set(demo.TEACHERS)
        assert all(found["row_bytes"] >= found["token_bytes"] for found in figures.values())
        sizes.append(sum(found["token_bytes"] for found in figures.values()))
        energies.append({name: found["error_energy"] for name, found in figures.items()})
    assert sizes == sorted(sizes, reverse=True)
    for family in ("lloyd", "lowrank"):
        own = [e for codec, e in zip(by_size, energies, strict=True) if codec.startswith(family)]
        assert all(a[name] < b[name] for a, b in pairwise(own) for name in a)


@pytest.mark.slow
def test_a_study_from_nothing_to_its_page(tmp_path, monkeypatch, capsys):
    chosen = tuple(replace(find_arm(name), worlds=(0,)) for name in ("none_mole", "shuffled_mole"))
    monkeypatch.setattr(study.summary, "arms", lambda everything: chosen)
    monkeypatch.setattr(study.plan, "WORLDS", (0,))
    place = Place(tmp_path / "work", tmp_path / "results", SMOKE, jobs=1)

    def runs_file() -> Path:
        return place.results / "runs.jsonl"

    with pytest.raises(SystemExit, match="8 runs have no row yet"):
        run_final(place, chosen)
    run_all(place, chosen)
    rows = results.read(place.results, "runs")
    assert len(rows) == len({results.run_id(row) for row in rows}) == 2 * 4
    whole = runs_file().read_bytes()

    # interrupted before the last row: only that run is made again, to the same figures
    runs_file().write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 10])
    run_all(place, chosen)
    again = results.read(place.results, "runs")
    assert again[:-1] == rows[:-1]
    for key in ("arm", "seed", "settings", "val", "token_std", "loss_kd", "routing"):
        assert again[-1].get(key) == rows[-1].get(key)

    # rows of another plan are refused
    changed = json.dumps({**rows[0], "settings": "other"}).encode() + b"\n"
    kept = runs_file().read_bytes()
    runs_file().write_bytes(kept + changed)
    with pytest.raises(SystemExit, match="made with other settings"):
        run_all(place, chosen)
    runs_file().write_bytes(kept)

    preview = page.write_report(place, is_final=False)
    assert "validation scenes" in preview.read_text()
    assert {path.name for path in preview.parent.glob("*.png")} >= {"accuracy.png", "time.png"}
    with pytest.raises(SystemExit, match="have not been looked at"):
        page.write_report(place, is_final=True)

    trial = explore.Trial("more", "rank", chosen[0], keys=("student.mole.r=4",))
    with pytest.raises(SystemExit, match="exploratory seeds begin at 100"):
        explore.run(place, trial, [0], [0])
    with pytest.raises(SystemExit, match=r"0 runs were made .* 21 more are asked for"):
        explore.run(place, trial, [0], range(100, 121))
    explore.run(place, trial, [0], [100])
    (tried,) = results.read(place.results, "exploratory")
    assert tried["keys"] == ["distill=null", "student.mole.r=4"]

    assert not list(place.work.rglob("test.json"))

    # students that are lost are trained again, and are those of their rows or are refused
    for seed in (1, 2):
        shutil.rmtree(place.work / f"runs/shuffled_mole-0-{seed}")
    kept = runs_file().read_bytes()
    (row,) = (row for row in again if (row["arm"], row["seed"]) == ("shuffled_mole", 2))
    runs_file().write_bytes(kept + json.dumps({**row, "loss_kd": [1.0, 0.5]}).encode() + b"\n")
    with pytest.raises(SystemExit, match="1 runs failed"):
        run_final(place, chosen)
    assert "its loss_kd is" in capsys.readouterr().out
    assert len(results.read(place.results, "final")) == 7
    runs_file().write_bytes(kept)
    run_final(place, chosen)
    final = results.read(place.results, "final")
    assert len(final) == 8
    assert all(row["test"]["all"][1] == SMOKE.num_test for row in final)
    written = (place.results / "final.jsonl").stat().st_mtime_ns
    run_final(place, chosen)  # nothing is scored twice
    assert (place.results / "final.jsonl").stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="nothing is chosen after that"):
        explore.run(place, trial, [0], [101])

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "study.md").write_text(
        f"by hand\n{page.BEGIN}\nof an earlier pass\n{page.END}\nafter\n"
    )
    monkeypatch.setattr(page, "DOCS", docs)
    text = page.write_report(place, is_final=True).read_text()
    assert text.startswith("by hand\n")
    assert text.endswith("after\n")
    assert "test scenes" in text
    assert "earlier pass" not in text
    assert "(study/accuracy.png)" in text
    assert page.write_report(place, is_final=True).read_text() == text


@pytest.mark.slow
def test_runs_that_answer_at_once_equal_runs_and_a_final_pass(tmp_path, capsys):
    chosen = (replace(find_arm("none_mole"), worlds=(0,)),)
    apart = Place(tmp_path / "work", tmp_path / "apart", SMOKE, jobs=1)
    run_all(apart, chosen)
    run_final(apart, chosen)
    rows = [results.by_run(results.read(apart.results, name)) for name in ("runs", "final")]

    # another machine has two of the rows, and no student
    shutil.rmtree(apart.work / "runs")
    at_once = Place(apart.work, tmp_path / "at_once", SMOKE, jobs=1)
    for row in list(rows[0].values())[:2]:
        results.append(at_once.results, "runs", row)
    capsys.readouterr()
    run_and_test_all(at_once, chosen)
    assert capsys.readouterr().out.count("none_mole world 0") == 4
    again = [results.read(at_once.results, name) for name in ("runs", "final")]
    assert len(again[0]) == len(again[1]) == 4
    for before, after in zip(rows, map(results.by_run, again), strict=True):
        for run, row in before.items():
            for key in ("settings", "val", "token_std", "test"):
                assert after[run].get(key) == row.get(key)
    written = (at_once.results / "final.jsonl").stat().st_mtime_ns
    run_and_test_all(at_once, chosen)
    assert (at_once.results / "final.jsonl").stat().st_mtime_ns == written
