"""`movekd probe`: one table of students, live teachers and cached ones; errors before any load."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from builds import build
from command import invoke
from labelled_folder import write_labelled_folder
from movekd.cache.spec import load_spec
from movekd.cli.main import app
from movekd.corpus.pack import pack_folder
from movekd.errors import MovekdError
from small_run import write_run


def ask(*arguments):
    return invoke(app, "probe", *arguments, "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_specs) -> Path:
    """A folder with ``images``, ``data``, ``cache``, ``run`` and ``clip.yaml``."""
    place = tmp_path_factory.mktemp("probe")
    write_labelled_folder(place / "images", num_train=25, num_test=5)
    pack_folder(place / "images" / "train", place / "data", num_workers=1)
    build(place / "cache", place / "data", tiny_specs)
    write_run(place / "run")
    (place / "clip.yaml").write_text(yaml.safe_dump(tiny_specs[0].model_dump(mode="json")))
    return place


@pytest.fixture
def no_model(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("movekd.evaluate.encoder.encoders.load_encoder", load)
    monkeypatch.setattr("movekd.analysis.live_teacher.LiveTeacher", load)


def test_students_and_teachers_stand_in_one_table(place):
    asked = [f"base:{place}/run", f"{place}/run", f"teacher:{place}/clip.yaml"]
    asked += ["--images", place / "images", "--cache", f"{place}/cache", "--no-linear"]
    asked += ["--features", place / "features"]
    result = ask(*asked, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {s["model"] for s in found["scores"]} == {s["model"] for s in found["fits"]}
    assert "over 10 test images, not over training seeds" in found["intervals"]
    assert found["intervals"].endswith("p: exact McNemar")
    assert [s["p"] is None for s in found["scores"]] == [True, True, False, False, False, False]
    assert all(0 < s["p"] <= 1 for s in found["scores"] if s["p"] is not None)
    assert len(found["scores"]) == 3 * 2
    assert len(found["fits"]) == 3 * 2 * 2
    used = found["fit_images"]
    assert used["found"] == 60 == used["used"] + sum(used["skipped"].values())
    assert used["used"] == 50
    of = {(f["model"], f["teacher"], f["measure"]): f["value"] for f in found["fits"]}
    assert of[asked[2], "clip", "r2"] > 0.99  # the teacher itself, but for the codec
    again = ask(*asked, "--shards", place / "data")
    assert again.exit_code == 0, again.output
    assert "to clip" in again.stdout
    assert "fit to teachers on 50 of 50 images" in again.stdout


def test_a_cached_teacher_is_compared_on_its_images(place, tmp_path):
    pack_folder(place / "images", tmp_path / "data", num_workers=1)
    build(tmp_path / "cache", tmp_path / "data", [load_spec(str(place / "clip.yaml"))])
    models = [f"teacher:{place}/clip.yaml", f"cache:{tmp_path}/cache#clip"]
    result = ask(*models, "--images", place / "images", "--no-linear", "--json")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["scores"]
    assert {s["feature"] for s in scores} == {"cls", "patches"}
    assert all(abs(s["difference"]) < 0.15 for s in scores if s["model"] == models[1])
    with pytest.raises(MovekdError, match=r"no image of test that can be used.* does not hold it"):
        ask(f"cache:{place}/cache#clip", "--images", place / "images", "--no-linear")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["nothing"], "holds neither config.yaml nor config.json"),
        (["base:nothing"], "names no run"),
        (["teacher:clop"], "no teacher 'clop'"),
        (["cache:nothing"], "holds no cache"),
        (["{}/run", "--shards", "{}/data"], "but no --cache is given"),
        (["{}/run", "--fit-images", "30"], "--fit-images is 30, but no --cache"),
        (["{}/run", "--resize-mode", "pad"], "acts only on teacher:SPEC"),
        (["{}/run", "--features", "{}/images"], "which no probe wrote"),
        (["{}/run", "--features", "{}/clip.yaml"], "cannot be used: File exists"),
        (["{}/run", "--cache", "{}/empty"], "holds no cache"),
        (["{}/run", "--k", "5000"], "--k is 5000"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(place, no_model, more, message):
    rest = [part.replace("{}", str(place)) for part in more]
    if not rest[0].startswith(str(place)):
        rest.insert(0, f"{place}/run")  # a good model before the bad one
    with pytest.raises(MovekdError, match=re.escape(message)):
        ask(*rest, "--images", place / "images")


def test_options_of_students_are_refused_where_all_models_are_teachers(place, no_model):
    with pytest.raises(MovekdError, match="--layer is -2, but all models are teachers"):
        ask(f"teacher:{place}/clip.yaml", "--layer", "-2", "--images", place / "images")


@pytest.fixture(scope="module")
def maps(place, tmp_path_factory):
    """Label maps whose left half is class 0."""
    labels, root = np.zeros((32, 32), np.uint8), tmp_path_factory.mktemp("maps")
    labels[:, 16:] = 1
    for path in (place / "images").rglob("*.png"):
        target = root / path.relative_to(place / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(target)
    return ["--images", place / "images", "--label-maps", root]


def test_label_maps_segment_images_by_students_and_teachers(place, maps):
    models = [f"{place}/run", f"base:{place}/run", f"teacher:{place}/clip.yaml"]
    result = ask(*models, *maps, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [score["model"] for score in found["scores"]] == models
    assert found["images"]["found"] == 61 == 50 + 10 + len(found["images"]["skipped"])
    assert all(score["miou"] > 0.8 for score in found["scores"])  # positions are in the tokens
    assert found["scores"][0]["p"] is None
    assert 0 < found["scores"][1]["p"] <= 1
    assert found["intervals"].endswith("p: permutation of whole images, 9,999 draws, seed 0")


@pytest.mark.parametrize("more", [["--cache", "cache/"], ["--no-linear"], ["--k", "5"]])
def test_options_of_other_probes_are_refused_with_label_maps(place, maps, no_model, more):
    with pytest.raises(MovekdError, match=f"{more[0]} is given with --label-maps"):
        ask(f"{place}/run", *maps, *more)


def test_label_maps_are_matched_with_a_cache_before_a_model_is_loaded(place, maps, no_model):
    """The cache holds the train images only."""
    with pytest.raises(MovekdError, match=r"test holds no image that can be used.* not hold it"):
        ask(f"{place}/run", f"cache:{place}/cache#clip", *maps)
