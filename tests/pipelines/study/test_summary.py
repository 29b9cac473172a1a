"""The committed report follows from the committed rows, also by an independent computation."""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

import scenes
from study import results, summary
from study.plan import FULL_SIZE, SECONDARY, SECONDARY_MORE, WORLDS, arms, runs

REPORT = json.loads((results.RESULTS / summary.REPORT).read_text(encoding="utf-8"))
FAMILIES = ("primary", "secondary", "parts", "afterwards")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inside in items:
            yield from leaves(inside, f"{path}/{key}")
    else:
        yield path, value


def by_world(part: str, first: str, second: str) -> list[list[float]]:
    """Differences of paired runs, a list per world, from the lines of the files."""
    path = results.RESULTS / f"{'final' if part == 'test' else 'runs'}.jsonl"
    right = {
        (row["arm"], row["world"], row["seed"]): row[part]["all"][0] / row[part]["all"][1]
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    }
    pairs = defaultdict(list)
    for (arm, world, seed), value in right.items():
        if arm == first and (second, world, seed) in right:
            pairs[world].append(value - right[second, world, seed])
    return [pairs[world] for world in WORLDS if pairs[world]]


def test_the_committed_report_is_that_of_the_committed_rows():
    committed = dict(leaves(REPORT))
    again = dict(leaves(summary.summarise(results.RESULTS, FULL_SIZE, is_final=True)))
    assert list(committed) == list(again)
    numbers = {path for path, value in again.items() if isinstance(value, float)}
    assert {path: committed[path] for path in numbers} == pytest.approx(
        {path: again[path] for path in numbers},
        rel=2e-3,  # another scipy may round a p in another way
    )
    assert all(committed[path] == again[path] for path in set(again) - numbers)


@pytest.mark.parametrize("part", ["test", "val"])
def test_every_contrast_is_scipys_t_test_of_the_worlds_means(part):
    for found in [c for family in FAMILIES for c in REPORT[part][family]]:
        means = [np.mean(v) for v in by_world(part, *found["contrast"].split(" - "))]
        assert found["worlds"] == pytest.approx(means, abs=1e-6), found["contrast"]
        assert found["difference"] == pytest.approx(np.mean(means), abs=1e-6)
        if len(means) < 2:
            assert (found["p"], found["low"], found["df"]) == (None, None, 0)
            continue
        assert (len(means), found["df"]) == (3, 2)
        test = stats.ttest_1samp(means, 0.0)
        bounds = test.confidence_interval(0.95)
        assert (found["low"], found["high"]) == pytest.approx(bounds, abs=1e-6)
        p = test.pvalue
        if found["margin"] is not None:
            above = stats.ttest_1samp(means, -found["margin"], alternative="greater").pvalue
            p = max(above, stats.ttest_1samp(means, found["margin"], alternative="less").pvalue)
        assert found["p"] == pytest.approx(p, rel=1e-3)


def test_holm_is_over_the_family_of_the_plan():
    secondary = REPORT["test"]["secondary"]
    assert [c["contrast"] for c in secondary] == [c.name for c in (*SECONDARY, *SECONDARY_MORE)]
    rising = sorted(secondary, key=lambda c: c["p"])
    steps = [min(1.0, c["p"] * (len(rising) - rank)) for rank, c in enumerate(rising)]
    expected = np.maximum.accumulate(steps)
    assert [c["p_holm"] for c in rising] == pytest.approx(expected, rel=1e-3)
    others = [c for f in FAMILIES if f != "secondary" for c in REPORT["test"][f]]
    assert all(c["p_holm"] is None for c in others)


def test_pairs_of_a_world_are_not_independent():
    """The intraclass correlation of paired differences is why worlds are the units."""
    found = {}
    for second in ("none_mole", "official_mole"):
        pairs = np.array(
            [values[:4] for values in by_world("test", "revised_mole", second)]
        )  # worlds x seeds
        between = pairs.shape[1] * pairs.mean(1).var(ddof=1)
        within = pairs.var(1, ddof=1).mean()
        found[second] = (between - within) / (between + (pairs.shape[1] - 1) * within)
    assert found["none_mole"] == pytest.approx(0.46, abs=0.01)
    assert found["official_mole"] == pytest.approx(0.80, abs=0.01)


def test_only_arms_that_have_answered_in_full_are_among_the_test_results():
    tested = {arm["arm"]: arm for arm in REPORT["test"]["arms"]}
    have = results.by_run(results.read(results.RESULTS, "final"))
    for arm in arms(everything=True):
        assert (arm.name in tested) is all(run in have for run in runs((arm,)))
    assert all((arm["runs"], arm["worlds"]) == (12, [0, 1, 2]) for arm in tested.values())
    assert not set(tested) & {arm["arm"] for arm in REPORT["val"]["arms"]}


def test_a_constant_answer_scores_what_the_corpus_says_of_itself(tmp_path):
    size = FULL_SIZE.num_test
    written = scenes.write_corpus(tmp_path, 0, 0, 0, size // 16, seed=1, split_seed=1)
    number, _, turns = scenes.PARTS["test"]
    _, asked = scenes.draw_questions(size // 16, np.random.default_rng([1, number]), turns)
    answers = defaultdict(list)
    for ((kind, _, answer),) in asked:
        answers[kind].append(answer)
    right = sum(max(map(given.count, given)) for given in answers.values())
    assert written["majority_test"] == right / len(asked)
    assert REPORT["constant_answers"]["all"] == pytest.approx(0.21, abs=0.01)
