"""The pilot on a small tower: rows are made once, also after an interruption, and test last."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from demo_real import Steps
from movekd.cache.reader import open_cache
from movekd.cli.main import app
from movekd.errors import ConfigError
from pilot import RESULTS, Pilot
from pilot_arms import ARMS, FULL, TEACHERS, Arm
from pilot_images import WHOLE, Sizes, divide, draw
from pilot_rows import tables
from study import results

REPOSITORY = Path(__file__).parents[3]
SIZES = Sizes(distilled=12, labelled=10, val=3, test=4)
ONE = ("vit_s",)
SMALL = (
    Arm("full", FULL, ONE, steps=2),
    Arm("shuffled", FULL, ONE, steps=2, cache="shuffled"),
)
SAME = ("seconds", "date")


class InProcess(Steps):
    """Steps whose commands run here, until ``left`` of them are done."""

    left = 1000

    def movekd(self, name: str, *arguments: Any) -> None:
        def command() -> str:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            result = CliRunner().invoke(app, [str(argument) for argument in arguments])
            if result.exception is not None:
                raise result.exception
            return result.stdout

        self.do(name, command)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes: bright and dark noise."""
    folder, draw = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 4)):
        for level, name in ((60, "dark"), (190, "bright")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(level - 60, level + 60, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number:04d}.jpg")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    keys = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**keys, image_size=112, patch_size=14)).save_pretrained(
        folder / "vit_s"
    )
    normalisation = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "vit_s/preprocessor_config.json").write_text(json.dumps(normalisation))
    return folder


@pytest.fixture
def pilot(images: Path, weights: Path, tmp_path: Path) -> Callable[..., Pilot]:
    """Return a function that makes the pilot of a folder again, as a new process would."""

    def make(name: str = "once", left: int = 1000, sizes: Sizes = SIZES) -> Pilot:
        steps = InProcess(tmp_path / name, {"seed": 0})
        steps.left = left
        small = ("training.bf16=false", "training.use_cpu=true", "training.report_to=none")
        extra = [word for key in (*small, "student.mole=null") for word in ("--set", key)]
        return Pilot(
            steps,
            tmp_path / name,
            images,
            weights,
            tmp_path / name / "rows",
            sizes=sizes,
            extra=extra,
        )

    return make


def rows(pilot: Pilot, file: results.Name) -> list[dict[str, Any]]:
    found = results.read(pilot.rows, file)
    return [{key: value for key, value in row.items() if key not in SAME} for row in found]


def everything(pilot: Pilot) -> Pilot:
    pilot.train(SMALL)
    pilot.final(SMALL)
    return pilot


def test_interrupted_and_resumed_equals_uninterrupted_and_test_is_read_once(
    pilot: Callable[..., Pilot], tmp_path: Path
) -> None:
    whole = pilot()
    with pytest.raises(ConfigError, match=r"lacks full, shuffled; expected all arms"):
        whole.final(SMALL)
    whole.train(SMALL)
    done = (tmp_path / "once/steps.json").read_text()
    assert "probe full" in done
    assert "test of" not in done  # no image of test was looked at
    whole.final(SMALL)
    for left in (2, 2, 2, 1):  # pack, cache; full and its probe; shuffled; half of the final pass
        stopped = pilot("again", left=left)
        with pytest.raises(KeyboardInterrupt):
            everything(stopped)
    resumed = everything(pilot("again"))
    assert rows(resumed, "runs") == rows(whole, "runs")
    assert rows(resumed, "final") == rows(whole, "final")
    idle = everything(pilot("again", left=0))
    assert [row["arm"] for row in rows(idle, "final")] == ["base", "full", "shuffled"]
    last = rows(idle, "final")[-1]
    assert (
        set(last["minus_full"])
        == set(last["test"])
        == {
            *("knn cls", "knn patches", "linear cls", "linear patches"),
        }
    )
    with pytest.raises(ConfigError, match=r"row 'full' of .* was made with .*'steps': 2"):
        idle.train([Arm("full", FULL, ONE, steps=3)])


def test_without_validation_images_only_test_images_are_probed(
    pilot: Callable[..., Pilot],
) -> None:
    made = pilot("frozen", sizes=replace(SIZES, val=0))
    made.train(SMALL[:1])
    made.final(SMALL[:1])
    (row,) = rows(made, "runs")
    assert "val" not in row
    assert [row["arm"] for row in rows(made, "final")] == ["base", "full"]


def test_every_image_of_the_shuffled_cache_has_the_features_of_another(
    pilot: Callable[..., Pilot], tmp_path: Path
) -> None:
    made = pilot()
    made._prepare(SMALL)
    own, other = (open_cache(tmp_path / "once" / n)["vit_s"] for n in ("cache", "shuffled"))
    rows = range(own.num_rows)
    own_RD, other_RD = (cache.read(rows).tokens_BND.mean(1) for cache in (own, other))
    distance_RR = torch.cdist(torch.as_tensor(own_RD), torch.as_tensor(other_RD))
    source_R = distance_RR.argmin(0)
    assert sorted(source_R.tolist()) == list(rows)
    assert not (source_R == torch.arange(own.num_rows)).any()


def test_validation_and_test_images_are_never_distilled(images: Path, tmp_path: Path) -> None:
    divide(images, tmp_path, SIZES)
    content = {
        part: {path.read_bytes() for path in (tmp_path / part).rglob("*.jpg")}
        for part in ("source", "val/train", "val/test", "test/train", "test/test")
    }
    counts = {part: len(files) for part, files in content.items()}
    assert counts == {
        "source": 24,
        "val/train": 20,
        "val/test": 6,
        "test/train": 20,
        "test/test": 8,
    }
    assert content["val/train"] == content["test/train"] <= content["source"]
    assert not content["source"] & (content["val/test"] | content["test/test"])
    with pytest.raises(ConfigError, match=r"has 15 images; expected 16 or more"):
        divide(images, tmp_path / "more", Sizes(distilled=13, labelled=10, val=3, test=4))
    with pytest.raises(ConfigError, match=r"train does not exist; expected train/CLASS"):
        divide(tmp_path / "nothing", tmp_path / "more", SIZES)


@pytest.mark.slow
def test_real_teachers_teach_the_experts(
    real_weights: Callable[[str], Path], photographs: Path, tmp_path: Path
) -> None:
    """In processes, as a user runs it: only the experts learn, and every teacher has its figure."""
    folders = [real_weights(teacher) for teacher in TEACHERS]
    draw = np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 4)):
        for name in ("chelsea", "coffee"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            picture = Image.open(photographs / f"{name}.png")
            for number in range(count):
                left, top = draw.integers(0, 80, 2).tolist()
                crop = picture.resize((32, 32), box=(left, top, left + 220, top + 220))
                crop.save(tmp_path / "images" / split / name / f"{number:04d}.jpg")
    made = Pilot(
        Steps(tmp_path / "pilot", {"seed": 0}),
        tmp_path / "pilot",
        tmp_path / "images",
        folders[0].parent,
        tmp_path / "rows",
        sizes=SIZES,
    )
    made.train([Arm("experts", (), TEACHERS, steps=2)])
    (row,) = results.read(made.rows, "runs")
    assert set(row["kd_loss_max_over_median"]) == set(TEACHERS)
    assert set(row["val"]) == {"base", "experts"}
    assert row["val"]["experts"]["knn patches"]["accuracy"] > 0.8  # a cat is no coffee
    model = tmp_path / "pilot/runs/experts/model"
    assert {path.name for path in model.glob("*.safetensors")} == {
        *("mole_encoder.safetensors", "encoder_adapter.safetensors"),
    }


def test_of_the_whole_cifar_10_the_images_of_the_rows_are_taken(tmp_path: Path) -> None:
    names = draw([*("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse")])
    assert names["train", "airplane"][:6] == [f"{n:04d}.jpg" for n in (0, 1, 2, 9, 12, 15)]
    assert names["train", "cat"][:5] == [f"{n:04d}.jpg" for n in (6, 9, 10, 11, 12)]
    names = draw(["only"])
    for split, count in WHOLE.items():
        (tmp_path / split / "only").mkdir(parents=True)
        for number in range(count):
            (tmp_path / split / "only" / f"{number:04d}.jpg").touch()
    divide(tmp_path, tmp_path / "out", SIZES)
    for part, split, at in (("source", "train", slice(12)), ("test/test", "test", slice(4))):
        found = sorted(path.name for path in (tmp_path / "out" / part / "only").iterdir())
        assert found == names[split, "only"][at]


def test_the_rows_are_those_of_the_arms_as_they_stand() -> None:
    arms = {arm.name: arm for arm in ARMS}
    assert len(arms) == len(ARMS)
    runs = results.read(RESULTS, "runs")
    assert [row["arm"] for row in runs] == list(arms)
    for row in runs:
        arm = arms[row["arm"]]
        assert (tuple(row["keys"]), tuple(row["teachers"])) == (arm.keys, arm.teachers)
        assert (row["steps"], row["cache"]) == (arm.steps, arm.cache)
        assert row["sizes"] == asdict(Sizes())
    final = {row["arm"] for row in results.read(RESULTS, "final")}
    assert final == {"base", "efficientnet_lite0", *(a.name for a in ARMS if a.is_final)}


def test_the_tables_of_the_page_are_those_of_the_rows() -> None:
    page = (REPOSITORY / "docs/photos.md").read_text(encoding="utf-8").splitlines()
    lines = tables(RESULTS)
    assert len(lines) > 3 * 4
    assert [line for line in lines if line not in page] == []
