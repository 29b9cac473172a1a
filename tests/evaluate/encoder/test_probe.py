"""`movekd probe` against brute-force references, on a small run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import CLIPVisionModel
from typer.testing import CliRunner

from movekd.cli.main import app
from movekd.errors import ConfigError, CorpusError, WeightsError
from movekd.evaluate.encoder.classify import STRENGTHS, knn, linear_probe
from movekd.evaluate.encoder.encoders import Encoder, load_encoder
from movekd.evaluate.encoder.features import BLOCK_IMAGES, encode_images
from movekd.evaluate.encoder.labelled_images import LabelledImages, read_labelled_images
from movekd.evaluate.encoder.run import run_probe
from movekd.evaluate.intervals import bootstrap_interval
from movekd.student.checkpoint import ABOUT_FILE, PART_FILES, load_student
from movekd.student.export.formats import export
from movekd.student.export.model_card import Format
from small_run import WEIGHTS, write_run


def _quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def encoder(run: Path) -> Encoder:
    return load_encoder(str(run))


def _clusters(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, num)
    centres = np.random.default_rng(9).normal(size=(5, 16))
    return (centres[labels] + 1.5 * rng.normal(size=(num, 16))).astype(np.float32), labels


def test_knn_equals_a_loop_in_float64() -> None:
    (train, labels), (test, _) = _clusters(300, 1), _clusters(90, 2)
    found = knn(train, labels, test)
    left, right = (x.astype(np.float64) for x in (train, test))
    for image, label in zip(right, found, strict=True):
        cosine = left @ image / np.linalg.norm(left, axis=1) / np.linalg.norm(image)
        votes = np.zeros(5)
        for at in np.argsort(-cosine)[:20]:
            votes[labels[at]] += np.exp(cosine[at] / 0.07)
        assert label == votes.argmax()


def test_linear_probe_equals_logistic_regression_within_the_interval() -> None:
    (train, labels), (test, right) = _clusters(300, 1), _clusters(200, 2)
    predicted, strength = linear_probe(train, labels, test)
    assert strength in STRENGTHS
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=5000).fit(scaler.transform(train), labels)
    low, high = bootstrap_interval((predicted == right).astype(np.float64))
    assert low <= model.score(scaler.transform(test), right) <= high


def test_found_is_used_plus_reasons(images: LabelledImages) -> None:
    assert images.num_found == len(images.train) + len(images.test) + len(images.skipped) == 101
    assert list(images.skipped) == ["train/dark/notes.jpg"]


def test_features_are_those_of_stock_transformers(images: LabelledImages, run: Path) -> None:
    base = load_encoder(f"base:{run}")
    found = encode_images(base, images.test, images.read, None, _quiet)
    tower = CLIPVisionModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32).eval()
    transform = base.student.image_transform("crop")
    pixels = torch.from_numpy(np.stack([transform(images.read(i.name)) for i in images.test]))
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    np.testing.assert_allclose(found["cls"], hidden[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["patches"], hidden[:, 1:].mean(1), atol=1e-5)


def test_interrupted_and_resumed_equals_uninterrupted(
    images: LabelledImages, encoder: Encoder, tmp_path: Path
) -> None:
    whole = encode_images(encoder, images.train, images.read, None, _quiet)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_images(encoder, images.train, images.read, tmp_path, stop)
    assert len(list(tmp_path.iterdir())) == 1
    left = {image.name for image in images.train[BLOCK_IMAGES:]}
    asked: list[str] = []

    def read(name: str) -> bytes:
        asked.append(name)
        return images.read(name)

    resumed = encode_images(encoder, images.train, read, tmp_path, _quiet)
    assert set(asked) == left
    assert list(resumed) == list(whole) == ["cls", "patches"]
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
    damaged = next(tmp_path.iterdir())
    raw = damaged.read_bytes()
    damaged.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ConfigError, match="is damaged"):
        encode_images(encoder, images.train, read, tmp_path, _quiet)


@pytest.mark.parametrize("kind", ["encoder", "hf"])
def test_an_export_has_the_features_of_its_run(
    images: LabelledImages, run: Path, encoder: Encoder, tmp_path: Path, kind: Format
) -> None:
    export(load_student(run), kind, tmp_path / kind, check=False)
    if kind == "encoder":  # a run of `stage: distill` has no prompt
        about = tmp_path / kind / ABOUT_FILE
        about.write_text(json.dumps(json.loads(about.read_text()) | {"prompt": None}))
    exported = load_encoder(str(tmp_path / kind))
    found, wanted = (
        encode_images(e, images.test, images.read, None, _quiet) for e in (exported, encoder)
    )
    assert (exported.layer, exported.geometry) == (encoder.layer, encoder.geometry)
    for name in ("cls", "patches"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)


def test_what_an_encoder_export_says_about_itself_is_checked(run: Path, tmp_path: Path) -> None:
    export(load_student(run), "encoder", tmp_path / "encoder", check=False)
    about = tmp_path / "encoder" / ABOUT_FILE
    content = json.loads(about.read_text())
    for key, value in (
        ("vision_feature_layer", "last"),
        ("geometry", None),
        ("image_std", [0] * 3),
    ):
        about.write_text(json.dumps(content | {key: value}))
        with pytest.raises(WeightsError, match=f"has {key}.*expected what `movekd export` wrote"):
            load_encoder(str(tmp_path / "encoder"))


def test_a_run_with_experts_differs_from_its_base_once_they_learned(
    images: LabelledImages, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    path = run / "model" / PART_FILES["mole"]
    save_file({n: t + 0.05 for n, t in load_file(path).items()}, path)
    found = [load_encoder(model) for model in (f"base:{run}", str(run))]
    base, trained = (encode_images(e, images.test, images.read, None, _quiet) for e in found)
    assert found[0].identity != found[1].identity
    assert not np.allclose(base["patches"], trained["patches"], atol=1e-3)


def test_the_same_model_twice_differs_by_nothing(images: LabelledImages, encoder: Encoder) -> None:
    scores = run_probe(
        ["a", "b"], lambda _: encoder, images, features=None, progress=_quiet, k=5, linear=False
    )
    assert [(s.model, s.feature) for s in scores[:2]] == [("a", "cls"), ("a", "patches")]
    assert all(s.difference is None for s in scores[:2])
    assert all(s.p is None for s in scores[:2])
    assert all(s.difference == 0 and s.difference_interval == (0, 0) for s in scores[2:])
    assert all(s.p == 1 for s in scores[2:])


def test_too_many_neighbours_and_missing_classes_are_refused(
    images: LabelledImages, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--k is 9, but train holds 3"):
        knn(np.eye(3, dtype=np.float32), np.arange(3), np.eye(3, dtype=np.float32), k=9)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "cat" / "a.png")
    with pytest.raises(CorpusError, match="no train/cat"):
        read_labelled_images(tmp_path, _quiet)


def test_command_compares_a_run_with_its_base(folder: Path, run: Path) -> None:
    asked = ["probe", f"base:{run}", str(run), "--images", str(folder), "--json", "--device", "cpu"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["scores"]
    assert {s["probe"] for s in scores} == {"knn", "linear"}
    assert len(scores) == 8


def test_a_size_of_its_own_and_too_many_neighbours_are_said_before_anything_is_encoded(
    images: LabelledImages, run: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--image-size is 24, but .* was trained at a size"):
        load_encoder(str(run), image_size=24)

    def loaded(model: str) -> Encoder:
        raise AssertionError("loaded")

    with pytest.raises(ConfigError, match="--k is 100000, but train holds"):
        run_probe(["a"], loaded, images, features=None, progress=_quiet, k=100000, linear=False)
