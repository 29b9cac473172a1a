"""Subsets of photographs share no image, claims come in their order, and tests are SciPy's."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import subsets
from movekd.errors import ConfigError
from pilot_arms import ARMS
from pilot_rows import PROBES
from study import results
from subsets import NUM_SUBSETS, SIZES, divide_subsets, frozen_arms, summarise, tables

CLASSES = ("cat", "ship")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """As many files per class as the rows are about; each holds its path."""
    for split, count in (("train", 1000), ("test", 200)):
        for name in CLASSES:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:04d}.jpg").write_text(f"{split}/{name}/{number}")
    return tmp_path / "images"


def test_no_two_subsets_share_an_image_and_all_are_used(images: Path, tmp_path: Path) -> None:
    folders = divide_subsets(images, tmp_path / "out")
    assert len(folders) == NUM_SUBSETS
    held = [{path.read_text() for path in folder.rglob("*.jpg")} for folder in folders]
    assert {len(part) for part in held} == {len(CLASSES) * (SIZES.distilled + SIZES.test)}
    assert all(not first & second for first, second in combinations(held, 2))
    assert set().union(*held) == {path.read_text() for path in images.rglob("*.jpg")}
    for folder in folders:
        for split, count in (("train", SIZES.distilled), ("test", SIZES.test)):
            for name in CLASSES:
                files = list((folder / split / name).iterdir())
                assert len(files) == count
                assert all(file.read_text().startswith(f"{split}/{name}/") for file in files)
    (images / "train/cat/0000.jpg").unlink()
    with pytest.raises(ConfigError, match="has 999 images; expected 1000 or more"):
        divide_subsets(images, tmp_path / "more")


def test_settings_are_those_of_the_pilot() -> None:
    pilot = {arm.name: arm for arm in ARMS}
    experts, whole, shuffled = frozen_arms()
    for arm in (experts, whole):
        assert replace(arm, compared_with=()) == replace(pilot[arm.name], compared_with=())
    assert replace(shuffled, name="full_cnn_8", cache="cache") == whole
    assert (SIZES.distilled, SIZES.test, SIZES.val) == (125, 25, 0)


def made_rows(folder: Path, gains: dict[str, float], spread: float = 0.01) -> np.ndarray[Any, Any]:
    """Write rows of all subsets; return accuracies of linear patches (subset, arm)."""
    draw = np.random.default_rng(0)
    names = ["base", *(arm.name for arm in frozen_arms())]
    made = np.zeros((NUM_SUBSETS, len(names)))
    for number in range(NUM_SUBSETS):
        level = draw.normal(0.6, 0.03)
        for at, name in enumerate(names):
            made[number, at] = level + gains.get(name, 0.0) + draw.normal(0, spread)
            score = {"accuracy": float(made[number, at]), "interval": [0.0, 1.0]}
            row = {"arm": name, "test": dict.fromkeys(PROBES, score)}
            results.append(folder / str(number), "final", row)
    return made


def test_tests_are_scipys_over_subsets_and_the_first_open_one_ends_the_claims(
    tmp_path: Path,
) -> None:
    gains = {"experts_cnn_8": 0.05, "full_cnn_8": 0.05, "shuffled": -0.1}
    made = made_rows(tmp_path, gains)
    found = summarise(tmp_path)
    names = ["base", *(arm.name for arm in frozen_arms())]
    for entry in found["contrasts"]:
        first, second = (names.index(name) for name in entry["contrast"].split(" - "))
        exact = stats.ttest_1samp(made[:, first] - made[:, second], 0)
        assert entry["p"] == pytest.approx(exact.pvalue, rel=1e-3)
        interval = exact.confidence_interval(0.95)
        assert entry["linear patches"][1:] == pytest.approx(tuple(interval), abs=2e-6)
    assert [entry["claimed"] for entry in found["contrasts"]] == [True, True, True, False]
    assert found["contrasts"][-1]["p"] > 0.05
    text = "\n".join(tables(found))
    assert "Means over 8 of 8 subsets" in text
    assert text.count("| yes |") == 3

    lost = made_rows(tmp_path / "none", {"full_cnn_8": 0.05})
    assert lost.shape == (8, 4)
    assert not any(entry["claimed"] for entry in summarise(tmp_path / "none")["contrasts"])


def test_a_missing_subset_ends_all_claims_and_one_row_less_takes_the_subset_out(
    tmp_path: Path,
) -> None:
    made_rows(tmp_path, {"experts_cnn_8": 0.05, "full_cnn_8": 0.05})
    path = tmp_path / "3/final.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    found = summarise(tmp_path)
    assert found["subsets"] == 7
    assert not any(entry["claimed"] for entry in found["contrasts"])
    assert summarise(tmp_path / "nothing")["subsets"] == 0
    assert tables(summarise(tmp_path / "nothing")) == [
        "No result yet: two subsets or more need all their rows."
    ]


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    text = subsets.PAGE.read_text(encoding="utf-8")
    written = text[text.index(subsets.BEGIN) + len(subsets.BEGIN) : text.index(subsets.END)]
    found = summarise(subsets.ROWS)
    assert written.strip() == "\n".join(tables(found))
    report = subsets.ROWS / "report.json"
    if found["subsets"]:
        assert json.loads(report.read_text(encoding="utf-8")) == found
