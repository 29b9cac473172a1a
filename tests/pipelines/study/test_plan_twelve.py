"""The plan of twelve worlds: arms resolve, differ in the part that they name, and stand in docs."""

import json
from pathlib import Path

import pytest

import demo
from movekd.train.config import load_config
from study import explore, ideas, plan, plan_twelve, queue, results, tune
from study.__main__ import _chosen, _main_first, _parser
from study.plan import CACHES, DERIVED, SMOKE, Contrast, runs
from study.plan_twelve import ARMS, MAIN_ARMS, MINUS, PLUS

PAGE = (Path(__file__).parents[3] / "docs/twelve-worlds.md").read_text(encoding="utf-8")
PLAN = PAGE[: PAGE.index("<!-- results: begin -->")]
NAMED = {arm.name: arm for arm in ARMS}


def resolved(arm, stage):
    changes = [plan.REVISED, *arm.keys, *(arm.pretrain if stage == "pretrain" else arm.finetune)]
    return load_config(demo.HERE / f"{stage}.yaml", changes)


def contents(config):
    """Return every key of a config with its value: ``distill.grid`` -> native."""

    found = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, each in value.items():
                walk(f"{name}.{key}".removeprefix("."), each)
        else:
            found[name] = value

    walk("", config.model_dump(mode="json"))
    return found


def differing(first, second, stage="finetune"):
    """Return the keys in which two arms differ, recipe left out: it only fills in keys."""
    a, b = (contents(resolved(arm, stage)) for arm in (first, second))
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} - {"recipe"}


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_arm_resolves(arm, stage):
    config = resolved(arm, stage)
    assert (config.distill is None) is (arm.cache is None)
    assert (config.student.mole is not None) is arm.has_experts
    assert arm.cache is None or arm.cache in {*CACHES, *DERIVED}
    is_official = arm.name.startswith("official")
    assert config.recipe == ("official" if is_official else "revised_2026_11")


def test_sizes_are_those_of_the_page():
    assert len(NAMED) == len(ARMS)
    main, others = len(runs(MAIN_ARMS)), len(runs(ARMS)) - len(runs(MAIN_ARMS))
    assert (main, others) == (144, 280)
    assert f"{main} runs of main arms and {others} of parts, controls and ideas" in PLAN
    assert not {world for arm in ARMS for world in arm.worlds} & set(plan.WORLDS)
    assert all(seed < plan.FIRST_EXPLORATORY_SEED for arm in ARMS for seed in arm.seeds)


def test_the_page_names_every_arm_and_contrast():
    for arm in ARMS:
        assert f"`{arm.name}`" in PLAN
    for contrast in (plan_twelve.PRIMARY, *plan_twelve.SECONDARY):
        assert f"`{contrast.first}` - `{contrast.second}`" in " ".join(PLAN.split())
        assert {contrast.first, contrast.second} <= {arm.name for arm in MAIN_ARMS}
    assert len({*plan_twelve.SECONDARY, plan_twelve.PRIMARY, Contrast("a", "b")}) == 5


@pytest.mark.parametrize("arm", [*MINUS, *PLUS], ids=lambda arm: arm.name)
def test_a_part_is_one_change(arm):
    base = NAMED["revised_mole" if arm in MINUS else "official_tuned"]
    key_of = {"fixed": "distill.teacher_weighting"}
    key_of |= {part: keys[0].split("=")[0] for part, keys in plan_twelve.PARTS.items()}
    part = arm.name.split("_", 2)[2]
    if part == "base":
        assert differing(arm, base) == set()
        assert differing(arm, base, "pretrain") == {"trained"}
        return
    assert differing(arm, base) == differing(arm, base, "pretrain")
    wanted = {key_of[name] for name in part.split("_")}
    # a limit on targets belongs to standardised ones, the share to anchored weights
    assert wanted <= differing(arm, base) <= wanted | {"distill.anchor_share"}


@pytest.mark.parametrize(
    ("idea", "keys"),
    [
        ("summary", {"distill.summary_weight"}),
        ("scaled", {"distill.targets"}),
        ("balanced", {"distill.teacher_weighting"}),
        ("drop_best", {"distill.kd_weight", "loss_terms.without_best_teacher.weight"}),
        ("relations", {"loss_terms.relations.weight"}),
    ],
)
def test_an_idea_is_one_change(idea, keys):
    arms = NAMED[f"idea_{idea}"], NAMED["revised_mole"]
    assert differing(*arms) == differing(*arms, "pretrain") == keys


def test_dropping_the_best_teacher_replaces_a_loss_of_the_same_weight():
    dropped, base = (resolved(NAMED[n], "finetune") for n in ("idea_drop_best", "revised_mole"))
    assert dropped.loss_terms["without_best_teacher"]["weight"] == base.distill.kd_weight
    assert dropped.distill.anchor == ideas.ANCHOR
    assert base.distill.token_weighting == "blend"
    assert base.distill.token_blend == 0.5
    assert base.distill.loss == "mse"


def test_both_directions_lead_to_the_same_values():
    revised, official = (NAMED[name] for name in ("revised_mole", "official_tuned"))
    for key, (new, old) in plan_twelve.PARTS.items():
        name = new.split("=")[0]
        assert old.split("=")[0] == name, key
        for arm, pair in ((revised, new), (official, old)):
            value = contents(resolved(arm, "finetune"))[name]
            assert load_values(name, pair) == value, (key, arm.name)


def load_values(name, pair):
    value = pair.split("=")[1]
    return {"true": True, "false": False}.get(value, float(value) if value.isdigit() else value)


def test_what_was_tuned_is_what_the_rows_say(monkeypatch):
    rows = results.read(results.TWELVE_RESULTS, "exploratory")
    assert len(rows) == 8 * len(plan.WORLDS)
    monkeypatch.setattr(queue, "explore", lambda *_: pytest.fail("a run lacks its row"))
    found = tune.tune(queue.Place(Path("unused"), results.TWELVE_RESULTS, SMOKE))
    assert len(found) == 8
    both, stage_2 = tune.keys_of(list(found)[-1])
    assert (both, stage_2) == (plan_twelve.TUNED, plan_twelve.TUNED_RATE)
    assert max(found.values()) == list(found.values())[-1]


def test_tuning_takes_the_best_of_each_step_and_resumes(tmp_path, monkeypatch):
    made = []

    def score(keys):
        weight, share = (float(key.split("=")[1]) for key in keys)
        return round(200 - 10 * abs(weight - 2) - 40 * abs(share - 0.75))

    def make(place, tasks, about):
        for task in tasks:
            made.append((task.arm.name, task.run.world))
            run = {"arm": task.arm.name, "world": task.run.world, "seed": task.run.seed}
            right = score(about["keys"][1:]) - 30 * ("1.0e-3" not in about["finetune"][0])
            row = {**about, **run, "val": {"all": [right, 512]}}
            results.append(place.results, "exploratory", row)

    monkeypatch.setattr(queue, "explore", make)
    place = queue.Place(tmp_path / "work", tmp_path / "results", SMOKE)
    found = tune.tune(place)
    assert len(made) == len(set(made)) == 8 * 3
    chosen = list(found)[-1]
    assert chosen == ("2", "1.0e-3", "0.75")
    assert tune.tune(place) == found
    assert len(made) == 24  # the second call read the rows

    # cut in the middle of a step: only what is missing is made
    path = tmp_path / "results/exploratory.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]))
    assert tune.tune(place) == found
    assert len(made) == 24 + 14

    row = json.loads(lines[0])
    trial = explore.Trial(row["arm"], "another question", plan_twelve.OFFICIAL_ARM)
    with pytest.raises(SystemExit, match="made with other keys or for another question"):
        explore.run(place, trial, [0], [100])


@pytest.mark.parametrize(
    ("words", "num_arms", "num_runs"),
    [("", 41, 424), ("--worlds 3", 41, 6 * 2 + 35), ("--worlds 11 14", 6, 2 * 6 * 2)],
)
def test_a_part_of_the_worlds_can_be_run(words, num_arms, num_runs):
    given = _parser().parse_args(["run", "--study", "twelve", *words.split()])
    chosen = _chosen(given)
    assert (len(chosen), len(runs(chosen))) == (num_arms, num_runs)
    assert set(runs(chosen)) <= set(runs(ARMS))


def test_main_arms_run_first():
    assert _main_first(ARMS) == [MAIN_ARMS, ARMS[len(MAIN_ARMS) :]]
    assert _main_first(MINUS) == [MINUS]
    assert _main_first(plan.CODEC_ARMS) == [plan.CODEC_ARMS]


def test_every_study_finds_its_arms():
    for study, arm, other in (
        ("first", "none_full", "codec_int8"),
        ("codecs", "codec_int8", "none_mole"),
        ("twelve", "labels", "scale_4"),
    ):
        (found,) = _chosen(_parser().parse_args(["run", "--study", study, "--arms", arm]))
        assert found.name == arm
        with pytest.raises(SystemExit, match=f"no arm is named '{other}'"):
            _chosen(_parser().parse_args(["run", "--study", study, "--arms", other]))
