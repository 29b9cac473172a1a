"""`movekd probe`: one table of students, live teachers and cached ones; errors before any load."""

import json
import re
from pathlib import Path

import pytest
import yaml

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
