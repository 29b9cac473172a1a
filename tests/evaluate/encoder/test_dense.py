"""The dense linear probe against numpy references, and on scenes whose masks are known."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import scenes
from movekd.corpus.transforms import Geometry
from movekd.errors import ConfigError, CorpusError
from movekd.evaluate.encoder.dense import (
    count_pixels,
    miou,
    patch_shares,
    resampled_miou,
    run_dense_probe,
)
from movekd.evaluate.encoder.encoders import Encoder, load_encoder
from movekd.evaluate.encoder.label_maps import (
    IGNORED,
    MappedImages,
    decode_map,
    read_mapped_images,
    square_map,
)
from movekd.evaluate.encoder.probed_model import EncoderTokens, ProbedModel
from small_run import WEIGHTS

NUM = {"train": 40, "test": 20}


def _quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scenes, and the digit that covers each patch: 10 without one, ignored under pale ink."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(3)
    for split, count in NUM.items():
        drawn = scenes.compose(scenes.draw_digits(count, rng), split, rng)  # type: ignore[arg-type]
        labels_BHW = scenes.grid_labels(drawn).repeat(8, 1).repeat(8, 2).astype(np.uint8)
        labels_BHW[(drawn.ink_BHW > 0.2) & (drawn.ink_BHW <= 0.3)] = IGNORED
        for kind, pictures in (("images", drawn.images_BHW), ("maps", labels_BHW)):
            (root / kind / split).mkdir(parents=True)
            for at, picture in enumerate(pictures):
                Image.fromarray(picture).save(root / kind / split / f"{at:03}.png")
    return root / "images", root / "maps"


@pytest.fixture(scope="module")
def images(folders: tuple[Path, Path]) -> MappedImages:
    return read_mapped_images(*folders, _quiet)


def _reference(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mIoU of label maps, class by class in sets of pixels."""
    known = true != IGNORED
    ratios = []
    for label in np.unique(true[known]):
        is_true, is_predicted = (true == label) & known, (predicted == label) & known
        ratios.append((is_true & is_predicted).sum() / (is_true | is_predicted).sum())
    return float(np.mean(ratios))


class _Mirrored:
    """A model whose tokens lie in the opposite corner."""

    identity = None

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.geometry = encoder, encoder.geometry

    def encode(self, keys: Sequence[str], contents: Iterable[bytes]) -> EncoderTokens:
        return EncoderTokens(self.encoder.encode(keys, contents).tokens_BND.flip(1), None)


@pytest.fixture(scope="module")
def tower() -> Encoder:
    """A tower of the demo."""
    return load_encoder(str(WEIGHTS / "clip"))


def _by_hand(tower: Encoder, images: MappedImages, C: float) -> float:
    """Return the mIoU of a tower on 6x6 patches of 8 pixels, each patch learned pixel by pixel."""
    rows, labels = [], []
    for image in images.train:
        (tokens,) = tower.encode([], [images.read(image.name)]).tokens_BND.numpy()
        pixels = decode_map(images.read_map(image.map_name))
        for at, token in enumerate(tokens):
            top, left = 8 * (at // 6), 8 * (at % 6)
            known = pixels[top : top + 8, left : left + 8]
            for label in known[known != IGNORED]:
                rows.append(token)
                labels.append(label)
    every = [tower.encode([], [images.read(i.name)]).tokens_BND[0].numpy() for i in images.train]
    scaler = StandardScaler().fit(np.concatenate(every))
    model = LogisticRegression(C=C / 64, max_iter=5000)  # 64 pixels weigh as much as a patch
    model.fit(scaler.transform(np.stack(rows)), labels)
    true, predicted = [], []
    for image in images.test:
        (tokens,) = tower.encode([], [images.read(image.name)]).tokens_BND.numpy()
        values = model.decision_function(scaler.transform(tokens)).reshape(6, 6, -1)
        layers = [Image.fromarray(layer.astype(np.float32)) for layer in values.transpose(2, 0, 1)]
        resized = [layer.resize((48, 48), Image.Resampling.BILINEAR) for layer in layers]
        predicted.append(model.classes_[np.argmax(np.stack([np.asarray(r) for r in resized]), 0)])
        true.append(decode_map(images.read_map(image.map_name)))
    return _reference(np.stack(true), np.stack(predicted))


def test_miou_equals_a_numpy_reference_also_on_resampled_images() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, (7, 12, 12)).astype(np.uint8)
    predicted = np.where(rng.random(true.shape) < 0.6, true, rng.integers(0, 6, true.shape))
    true[rng.random(true.shape) < 0.1] = IGNORED
    true[true == 3] = 2  # a class that only the predictions have, beside class 5
    counts = np.stack([count_pixels(t, p, 6) for t, p in zip(true, predicted, strict=True)])
    assert miou(counts.sum(0)) == pytest.approx(_reference(true, predicted), abs=1e-12)
    rng = np.random.default_rng(0)
    for value in resampled_miou(counts, 40):
        drawn = rng.integers(0, 7, 7)
        assert value == pytest.approx(miou(counts[drawn].sum(0)), abs=1e-12)
        assert value == pytest.approx(_reference(true[drawn], predicted[drawn]), abs=1e-12)


def test_tokens_that_say_the_class_segment_without_an_error(tmp_path: Path) -> None:
    """Left and right halves of two classes; the border lies between two patches."""
    for split in NUM:
        for at in range(6):
            labels = np.full((32, 48), at % 3, np.uint8)
            labels[:, 24:] = (at + 1) % 3
            for kind in ("images", "maps"):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(labels).save(tmp_path / kind / split / f"{at}.png")

    class Oracle:
        identity = None
        geometry: Geometry = "pad"

        def encode(self, keys: Sequence[str], contents: Iterable[bytes]) -> EncoderTokens:
            maps = [square_map(decode_map(content), 6, "pad") for content in contents]
            known = torch.from_numpy(np.stack(maps)).long().flatten(1)
            return EncoderTokens(torch.nn.functional.one_hot(known, 256).float(), None)

    found = read_mapped_images(tmp_path / "images", tmp_path / "maps", _quiet)
    (score,) = run_dense_probe(["oracle"], lambda _: Oracle(), found, progress=_quiet, side=48)
    assert (score.miou, score.interval) == (1, (1, 1))


def test_patches_have_the_shares_of_their_pixels() -> None:
    labels = np.array([[0, 0, 1, 2], [0, 1, 2, 2], [IGNORED, IGNORED, 1, 1], [IGNORED] * 4])
    shares = patch_shares(labels.astype(np.uint8), 2, 3)
    wanted = np.array([[3, 1, 0], [0, 1, 3], [0, 0, 0], [0, 2, 0]]) / 4
    np.testing.assert_allclose(shares, wanted, atol=1e-7)


def test_a_tower_reads_the_handwriting_and_tokens_elsewhere_do_not(
    images: MappedImages, tower: Encoder
) -> None:
    loaded: dict[str, ProbedModel] = {"tower": tower, "same": tower, "other": _Mirrored(tower)}
    scores = run_dense_probe(
        list(loaded), lambda model: loaded[model], images, progress=_quiet, side=48
    )
    first, same, other = scores
    assert (first.difference, first.p) == (None, None)
    assert (same.difference, same.difference_interval, same.p) == (0, (0, 0), 1)
    assert first.interval[0] < first.miou < first.interval[1]
    assert other.difference_interval is not None
    assert other.difference_interval[1] < 0
    assert other.p is not None
    assert other.p < 0.05


@pytest.mark.slow
def test_the_whole_probe_equals_one_that_learns_pixel_by_pixel(
    images: MappedImages, tower: Encoder
) -> None:
    (score,) = run_dense_probe(["tower"], lambda _: tower, images, progress=_quiet, side=48)
    assert score.miou == pytest.approx(_by_hand(tower, images, score.C), abs=1e-3)


def test_found_is_used_plus_reasons(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, maps = tmp_path / "images", tmp_path / "maps"
    for source, target in zip(folders, (images, maps), strict=True):
        for split in NUM:
            (target / split).mkdir(parents=True)
            for at in range(9):
                path = source / split / f"{at:03}.png"
                (target / split / path.name).write_bytes(path.read_bytes())
    (maps / "train" / "000.png").unlink()
    (images / "train" / "001.png").write_bytes(b"no image")
    (maps / "train" / "002.png").write_bytes(b"no map")
    Image.new("L", (5, 5)).save(maps / "train" / "003.png")
    Image.new("RGB", (48, 48)).save(maps / "train" / "004.png")
    Image.new("L", (48, 48), IGNORED).save(maps / "train" / "005.png")
    (images / "train" / "006.png").unlink()
    (images / "readme.txt").write_text("none")
    found = read_mapped_images(images, maps, _quiet)
    assert [image.name for image in found.train] == ["train/007.png", "train/008.png"]
    assert found.num_found == len(found.train) + len(found.test) + len(found.skipped) == 19
    said = "\n".join(f"{name}: {why}" for name, why in found.skipped.items())
    for part in (
        "train/000.png: it has no label map train/000.png",
        "train/001.png: 8 bytes are no image",
        "train/002.png: its label map cannot be decoded",
        "train/003.png: its label map has 5 x 5 pixels and the image 48 x 48",
        "train/004.png: its label map is a PNG of mode RGB",
        "train/005.png: its label map train/005.png ignores every pixel",
        "maps/train/006.png: it is the label map of no image",
        "readme.txt: it lies neither in train/ nor in test/",
    ):
        assert part in said


def test_a_palette_holds_classes_and_padding_is_ignored() -> None:
    labels = np.array([[3, 7, 7, 255], [3, 3, 7, 7]], np.uint8)
    picture = Image.fromarray(labels, mode="P")
    picture.putpalette([9] * 768)
    picture.save(stream := io.BytesIO(), "PNG")
    found = decode_map(stream.getvalue(), (4, 2))
    assert np.array_equal(found, labels)
    padded = square_map(found, 4, "pad")
    assert np.array_equal(padded[1:3], labels)
    assert (padded[[0, 3]] == IGNORED).all()


def test_folders_that_cannot_be_told_apart_or_do_not_match_are_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"are both .*; expected two folders"):
        read_mapped_images(folders[0], folders[0], _quiet)
    with pytest.raises(
        CorpusError, match=r"holds no image that can be used; .* it has no label map"
    ):
        read_mapped_images(folders[0], tmp_path, _quiet)
    for split in NUM:
        (tmp_path / split).mkdir()
        Image.new("L", (48, 48), 4).save(tmp_path / split / "000.png")
    with pytest.raises(CorpusError, match="hold only class 4; expected two or more"):
        read_mapped_images(folders[0], tmp_path, _quiet)
