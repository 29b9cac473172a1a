"""`make bench-probe`: the speed of the kNN probe, and a small probe table.

kNN as `movekd probe` computes it, on features like those of a probe: 10,000 train and 500 test
images of 1,024 channels in 10 classes. Held against a plain loop in torch over test images on the
same features, and against the bare matrix product of all test images with all train images, which
is the limit of an exact search. Then `movekd probe` on scenes of handwriting, which the script
draws: the demo's small CLIP, and a tower of the same shape with random weights.

    python benchmarks/probe.py [--train 10000] [--pairs 20]

Dimensions: M train images, N test images, D channels, K classes.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel

from movekd.evaluate.encoder.classify import NUM_NEIGHBOURS, TEMPERATURE, Array, Labels, knn
from movekd.evaluate.encoder.dense import run_dense_probe
from movekd.evaluate.encoder.encoders import Encoder, load_encoder
from movekd.evaluate.encoder.label_maps import read_mapped_images
from movekd.evaluate.encoder.labelled_images import read_labelled_images
from movekd.evaluate.encoder.run import run_probe
from movekd.resources import resource_dir
from movekd.student.hf_loading import quiet_libraries
from report import Figure, interleaved_ratio, write_figures

DIGITS = resource_dir("pipelines") / "digits"
TOWER = DIGITS / "weights" / "clip"
NUM_TRAIN, NUM_TEST, WIDTH, NUM_CLASSES = 10_000, 500, 1_024, 10
SCENES = {"train": 600, "test": 300}


def main() -> None:
    """Measure, print a table, write results/probe.json."""
    parser = argparse.ArgumentParser(description="Benchmarks of the probe.")
    parser.add_argument("--train", type=int, default=NUM_TRAIN)
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    quiet_libraries()
    sys.path.insert(0, str(DIGITS))
    figures = speed_figures(arguments.train, arguments.pairs) + table_figures()
    is_complete = arguments.train == NUM_TRAIN and arguments.pairs == 20
    write_figures("probe", figures, is_complete=is_complete)


def speed_figures(num_train: int, pairs: int) -> list[Figure]:
    """Time kNN, the loop and the product by turns."""
    train_MD, labels_M = _clusters(num_train, seed=1)
    test_ND, _ = _clusters(NUM_TEST, seed=2)

    def ours() -> Labels:
        return knn(train_MD, labels_M, test_ND)

    def loop() -> Labels:
        return knn_loop(train_MD, labels_M, test_ND)

    def product() -> Tensor:
        return torch.from_numpy(test_ND) @ torch.from_numpy(train_MD).T

    differing = int((ours() != loop()).sum())
    size = f"{num_train} train, {NUM_TEST} test images, {WIDTH} channels; median of {pairs} pairs"
    over_loop = interleaved_ratio(loop, ours, pairs)  # time over time: rate over rate the other way
    over_product = interleaved_ratio(product, ours, pairs)
    return [
        Figure(
            "probe_knn_over_reference",
            over_loop[0],
            f"rate over a loop in torch over test images; {size}",
            over_loop[1:],
            at_least=2.0,
        ),
        Figure(
            "probe_knn_over_product",
            over_product[0],
            f"rate over the bare product of all pairs, the limit; {size}",
            over_product[1:],
        ),
        Figure("probe_knn_differing", differing, "test images that the loop classifies otherwise"),
    ]


def knn_loop(train_MD: Array, labels_M: Labels, test_ND: Array) -> Labels:
    """Return what ``knn`` returns, one test image after the other."""
    normed_MD = torch.nn.functional.normalize(torch.from_numpy(train_MD), dim=1)
    labels = torch.from_numpy(labels_M)
    num_classes, found = int(labels.max()) + 1, []
    for test_D in torch.from_numpy(test_ND):
        cosine_M = normed_MD @ torch.nn.functional.normalize(test_D, dim=0)
        top, at = cosine_M.topk(NUM_NEIGHBOURS)
        votes = torch.zeros(num_classes, dtype=torch.float64)
        votes.index_add_(0, labels[at], (top.double() / TEMPERATURE).exp())
        found.append(int(votes.argmax()))
    return np.array(found, np.int64)


def table_figures() -> list[Figure]:
    """Return what `movekd probe` finds of two towers on scenes of handwriting."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(folder)
        torch.manual_seed(0)
        untrained = CLIPVisionModel(CLIPVisionModel.config_class.from_pretrained(TOWER))
        untrained.save_pretrained(folder / "untrained")
        shutil.copy(TOWER / "preprocessor_config.json", folder / "untrained")
        towers = {"trained": TOWER, "untrained": folder / "untrained"}

        def load(model: str) -> Encoder:
            return load_encoder(str(towers[model]))

        labelled = read_labelled_images(folder / "labelled", _quiet)
        scores = run_probe(list(towers), load, labelled, features=None, progress=_quiet)
        mapped = read_mapped_images(folder / "mapped", folder / "maps", _quiet)
        dense = run_dense_probe(list(towers), load, mapped, progress=_quiet)
    count = f"{SCENES['train']} train and {SCENES['test']} test scenes"
    return [
        Figure(
            f"probe_{score.model}_{score.probe}_{score.feature}",
            score.accuracy,
            f"accuracy; {count} of one digit, 10 classes; interval over test scenes",
            score.interval,
        )
        for score in scores
    ] + [
        Figure(
            f"probe_{score.model}_dense_miou",
            score.miou,
            f"mIoU; {count} of 2 to 4 digits, 11 classes; interval over test scenes",
            score.interval,
        )
        for score in dense
    ]


def write_scenes(folder: Path) -> None:
    """Write scenes of one digit in folders per class, and scenes of several with label maps.

    Train and test have the handwriting of other scans. The label of a patch of 8 x 8 pixels is the
    digit that covers it, or 10.
    """
    import scenes

    parts: tuple[scenes.Split, ...] = ("train", "test")
    for number, part in enumerate(parts):
        rng, count = np.random.default_rng([7, number]), SCENES[part]
        one_BC = np.full((count, 4), scenes.EMPTY)
        digits_B = np.arange(count) % 10
        one_BC[np.arange(count), rng.integers(0, 4, count)] = digits_B
        for at, image_HW in enumerate(scenes.compose(one_BC, part, rng).images_BHW):
            _write(folder / "labelled" / part / str(digits_B[at]) / f"{at:04}.png", image_HW)
        drawn = scenes.compose(scenes.draw_digits(count, rng), part, rng)
        labels_BHW = scenes.grid_labels(drawn).repeat(8, 1).repeat(8, 2).astype(np.uint8)
        for at in range(count):
            _write(folder / "mapped" / part / f"{at:04}.png", drawn.images_BHW[at])
            _write(folder / "maps" / part / f"{at:04}.png", labels_BHW[at])


def _write(path: Path, pixels_HW: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_HW).save(path)


def _clusters(count: int, seed: int) -> tuple[Array, Labels]:
    """Return features around a centre per class, (count, D) float32, and labels."""
    centres_KD = np.random.default_rng(0).standard_normal((NUM_CLASSES, WIDTH), np.float32)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, count)
    noise = rng.standard_normal((count, WIDTH), np.float32)
    return centres_KD[labels] + 6 * noise, labels


def _quiet(what: str, done: int, total: int) -> None:
    """Show no progress."""


if __name__ == "__main__":
    main()
