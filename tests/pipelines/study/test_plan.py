"""`movekd train` accepts every arm of the plan, and every contrast is between such arms."""

import re
from pathlib import Path

import pytest

import demo
from movekd.train.config import load_config
from study.plan import (
    CACHES,
    CODEC_ARMS,
    CODEC_CONTRASTS,
    CODECS,
    DERIVED,
    PRIMARY,
    REVISED,
    SECONDARY,
    SECONDARY_MORE,
    STUDY,
    TIME_BASE,
    WORLDS,
    arms,
    find_arm,
    runs,
)

PAGE = (Path(__file__).parents[3] / "docs/study.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arm", arms(everything=True), ids=lambda arm: arm.name)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_arm_resolves(arm, stage):
    changes = [REVISED, *arm.keys, *(arm.pretrain if stage == "pretrain" else ())]
    config = load_config(demo.HERE / f"{stage}.yaml", changes)
    assert (config.distill is None) is (arm.cache is None)
    assert (config.student.mole is not None) is arm.has_experts
    assert arm.cache is None or arm.cache in {*CACHES, *DERIVED}
    assert config.trained is not None
    assert "projector" in config.trained
    if not arm.has_experts:  # full fine-tuning: the tower learns in both stages
        assert "vision_tower" in config.trained


def test_arms_differ_from_what_they_are_compared_with():
    shipped = load_config(demo.HERE / "finetune.yaml", [REVISED])
    seen = {}
    for arm in arms(everything=True):
        if arm.matches_time_of is None:
            config = load_config(demo.HERE / "finetune.yaml", [REVISED, *arm.keys])
            key = (config.to_yaml(), arm.pretrain, arm.cache)
            assert key not in seen, (arm.name, seen.get(key))
            seen[key] = arm.name
    former = [REVISED, *find_arm("revised_mole").keys]
    assert load_config(demo.HERE / "finetune.yaml", former) == shipped


def test_codecs_differ_in_the_cache_only_and_are_in_the_plan():
    for arm in CODEC_ARMS:
        assert (arm.keys, arm.pretrain, arm.seeds) == ((), (), tuple(range(8)))
    assert find_arm("revised_mole").keys == ()
    assert [arm.what for arm in CODEC_ARMS] == ["float16", *CODECS]
    assert [c.first for c in CODEC_CONTRASTS] == [f"codec_{codec}" for codec in CODECS]
    assert {(c.second, c.margin) for c in CODEC_CONTRASTS} == {("codec_float16", 0.01)}
    named = PAGE[PAGE.index("## Codecs") :].split("**Runs**")[0]
    assert [c for c in re.findall(r"`(\w+)`", named) if c in CODECS] == list(CODECS)
    assert len(runs(CODEC_ARMS)) == 216


def test_contrasts_are_of_arms_and_the_study_has_its_own():
    known = {arm.name for arm in arms(everything=True)}
    for contrast in (PRIMARY, *SECONDARY, *SECONDARY_MORE):
        assert {contrast.first, contrast.second} <= known
    study = {arm.name for arm in STUDY}
    for contrast in (PRIMARY, *SECONDARY):
        assert {contrast.first, contrast.second} <= study
    for longer, base in TIME_BASE.items():
        assert {longer, base} <= study
    with pytest.raises(SystemExit, match="no arm is named 'revized'; known are none_mole"):
        find_arm("revized")


def test_the_page_names_every_arm_and_contrast():
    for arm in arms(everything=True):
        assert f"`{arm.name}`" in PAGE
    for contrast in (PRIMARY, *SECONDARY, *SECONDARY_MORE):
        assert f"`{contrast.first}` - `{contrast.second}`" in PAGE


def test_runs_go_seed_by_seed_and_those_that_match_a_time_come_last():
    order = runs(arms(everything=False))
    assert len(order) == len(set(order)) == 6 * 3 * 4
    assert {run.seed for run in order[: 6 * len(WORLDS)]} == {0}
    everything = runs(arms(everything=True))
    assert set(order) <= set(everything)
    is_timed = [find_arm(run.arm).matches_time_of is not None for run in everything]
    assert is_timed == sorted(is_timed)
    assert sum(run.arm == "float16" for run in everything) == 36
    assert sum(run.arm == "revised_mole" for run in everything) == 36
