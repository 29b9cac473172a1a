"""Bits against error on real features: what each codec stores, and what of it the loss feels.

For every teacher and codec: bytes per image, the energy error, the token error, and the cosine
between the gradients of the KD loss from decoded and from exact targets, for several students. The
gradient is taken at the student's tokens, through the head that predicts this teacher:

    untrained   tokens and head as drawn
    near        a residual of a tenth of the target: the worst case for a codec
    NAME        a run of `stage: distill`, with its own tokens, head and form of the loss

Half of the images settle the channel statistics, as a calibration does; the others are measured.

    make curve      # photographs that installed packages carry, teachers of pipelines/photos
    python benchmarks/curve.py --shards data/ --teacher vit_s.yaml --run half=runs/a end=runs/b

results/curve.json has a row for each kind of images, teacher and codec. Rows are written as they
come; one that is there already is not measured again.

Legend: B images, N student tokens, S channels of the student, T channels of the teacher.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo_real import write_spec
from movekd.analysis.codec_trial import CodecTrial
from movekd.analysis.fidelity import draw_images
from movekd.analysis.kd_gradient import KDGradient, LossTargets
from movekd.cache.codecs import codec_names
from movekd.cache.layout import teacher_layout
from movekd.cache.spec import DEFAULT_STD_FLOOR, load_spec
from movekd.cache.stats import ChannelStats, StatsAccumulator
from movekd.cli.output import print_table, progress_bar
from movekd.config import read_yaml
from movekd.corpus.index import Corpus, open_corpus
from movekd.corpus.pack import pack_folder
from movekd.distill import kd_loss
from movekd.distill.token_loss import limit
from movekd.errors import ConfigError
from movekd.evaluate.encoder.encoders import load_encoder
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.run_teacher import LiveFeatures, live_features
from movekd.student.adapters import StudentHead
from movekd.student.checkpoint import ADAPTERS_FILE
from movekd.teachers import Teacher, load_teacher
from photographs import write_jpegs
from report import RESULTS, machine
from weights import make_weights

TEACHERS = ("vit_s", "efficientnet_lite0", "efficientnet_lite2", "hed")

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainedGradient:
    """The gradient of a trained student's KD loss for one teacher, at the student's own tokens.

    Attributes:
        tokens_of: tokens (N, S) of each measured image, by its position in the corpus.
        head: what the student learned to predict this teacher with.
        form: the run's ``distill.loss``.
        clip: the run's ``distill.target_clip``.
    """

    tokens_of: Mapping[int, Tensor]
    head: StudentHead
    form: Any
    clip: float

    def __call__(self, images: Sequence[int], targets: LossTargets) -> Tensor:
        """Return the gradient (B, N, S) for the targets of some images."""
        tokens_BNS = torch.stack([self.tokens_of[image] for image in images]).requires_grad_()
        goal_BNT = limit(targets.standardised_BNT, self.clip)
        weight_B1 = torch.ones(len(images), 1)
        terms = kd_loss(
            [self.head(tokens_BNS)], [goal_BNT], weight_B1, None, combine="mean", form=self.form
        )
        return torch.autograd.grad(terms.total_B.sum(), tokens_BNS)[0]


@dataclass(frozen=True)
class Run:
    """A trained student: its tokens of the measured images, and where its heads are."""

    name: str
    folder: Path
    tokens_of: Mapping[int, Tensor]

    @classmethod
    def load(cls, name: str, folder: Path, corpus: Corpus, images: Sequence[int]) -> "Run":
        """Encode the measured images with the run's student."""
        encoder = load_encoder(str(folder))
        tokens_of = {}
        for image in images:
            output = encoder.encode([corpus.key(image)], iter([corpus.read_image(image)]))
            tokens_of[image] = output.tokens_BND[0].clone()
        return cls(name, folder, tokens_of)

    def gradient(self, teacher: str) -> TrainedGradient:
        """Return the gradient for one teacher.

        Raises:
            ConfigError: the run has no head for it.
        """
        tensors = load_file(self.folder / "model" / ADAPTERS_FILE)
        found = {
            name.removeprefix(f"{teacher}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{teacher}.")
        }
        if "output.weight" not in found:
            raise ConfigError(
                f"{self.folder} has no head of adapters: student for '{teacher}'; expected a run "
                "of stage distill with this teacher. Give another --run."
            )
        width, hidden = found["output.weight"].shape
        head = StudentHead(len(found["norm.weight"]), width, hidden)
        head.load_state_dict(found)
        distill = read_yaml(self.folder / "config.yaml")["distill"]
        head.requires_grad_(False)
        return TrainedGradient(
            self.tokens_of, head, distill["loss"] or "mse", distill["target_clip"] or 0.0
        )


def measure(
    teacher: Teacher,
    corpus: Corpus,
    codecs: Sequence[str],
    runs: Sequence[Run],
    *,
    calibrate: Sequence[int],
    images: Sequence[int],
    student_grid: int,
    student_width: int,
    progress: Progress,
) -> Iterator[Row]:
    """Yield a row per codec; a codec that refuses the features has the reason in its row."""
    spec, options = teacher.spec, BuildOptions(device="cpu", batch_size=8)

    def live(some: Sequence[int], label: str) -> Iterator[LiveFeatures]:
        chosen, whole = np.asarray(some, np.int64), np.zeros(len(some), np.int16)
        label = f"{spec.name}: {label}"
        for features in live_features(
            teacher, corpus, "crop", chosen, whole, options, {}, progress, label
        ):
            yield features if spec.grid == "native" else features.resize(spec.grid)

    statistics = StatsAccumulator()
    for features in live(calibrate, "calibrate"):
        statistics.add(features.tokens_BND)
    stats = statistics.result(DEFAULT_STD_FLOOR if spec.std_floor is None else spec.std_floor)
    kept = list(live(images, "measure"))
    _, num_tokens, width = kept[0].tokens_BND.shape
    drawn = KDGradient(student_grid**2, student_width, num_tokens, width)
    trained = {run.name: run.gradient(spec.name) for run in runs}

    def gradients(features: LiveFeatures, targets: LossTargets, exact: LossTargets) -> Any:
        keys = [corpus.key(image) for image in features.images]
        return drawn.all(keys, targets, exact) | {
            name: of(features.images, targets) for name, of in trained.items()
        }

    for codec in codecs:
        trial = CodecTrial(codec, kept[0].grid, False, student_grid)
        found = _errors(trial, kept, stats, gradients)
        if "refused" not in found:
            sizes = [
                teacher_layout(name, num_tokens, width, cls_width=None, num_heads=None).row_bytes
                for name in (codec, "float16")
            ]
            found |= {"row_bytes": sizes[0], "over_float16": sizes[0] / sizes[1]}
        yield {"teacher": spec.name, "codec": codec} | found
        progress(f"{spec.name}: {codec}", 1, 1)


def _errors(
    trial: CodecTrial, kept: Sequence[LiveFeatures], stats: ChannelStats, gradients: Any
) -> Row:
    for features in kept:
        exact = trial.exact_targets(features, stats)
        decoded = trial.store(features, stats)
        if decoded is None:
            return {"refused": trial.refusal}
        trial.compare(gradients(features, exact, exact), gradients(features, decoded, exact))
    found = trial.result(is_spec=False)
    cosines = {name.removeprefix("revised_"): asdict(c) for name, c in trial.cosines().items()}
    return {
        "num_images": sum(len(features.images) for features in kept),
        "energy_error": found.energy_error,
        "token_error": found.error_mean,
        "token_error_limited": found.error_limited_mean,
        "token_cosine": found.token_cosine,
        "gradient_cosine": cosines,
    }


def main() -> None:
    """Parse the command line and measure what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=Path, help="Corpus. Default: photographs of packages.")
    parser.add_argument("--teacher", nargs="+", help="Specs. Default: those of pipelines/photos.")
    parser.add_argument("--weights", type=Path, default=Path("demo-real/weights"))
    parser.add_argument("--codec", nargs="+", help="Default: all that are registered.")
    parser.add_argument("--run", nargs="*", default=[], help="NAME=FOLDER of trained students.")
    parser.add_argument("--what", default="photographs", help="Kind of images, for the rows.")
    parser.add_argument("--images", type=int, default=80, help="Half of them are measured.")
    parser.add_argument("--student-grid", type=int, default=8)
    parser.add_argument("--student-width", type=int, default=384)
    parser.add_argument("--results", type=Path, default=RESULTS / "curve.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _run(given, Path(folder))


def _run(given: argparse.Namespace, folder: Path) -> None:
    if given.teacher is None:
        make_weights(given.weights.resolve(), TEACHERS)
        made = [write_spec(name, folder, given.weights.resolve()) for name in TEACHERS]
        given.teacher = [str(path) for path in made]
    if given.shards is None:
        write_jpegs(folder / "images", given.images)
        pack_folder(folder / "images", folder / "data")
        given.shards = folder / "data"
    corpus, half = open_corpus(given.shards), given.images // 2
    calibrate, images = (part.tolist() for part in draw_images(corpus, half, half))
    runs = [
        Run.load(name, Path(folder), corpus, images)
        for name, _, folder in (word.partition("=") for word in given.run)
    ]
    written = json.loads(given.results.read_text())["rows"] if given.results.exists() else []
    rows = {(row["what"], row["teacher"], row["codec"]): row for row in written}
    for name in given.teacher:
        spec = load_spec(name)
        wanted = given.codec or codec_names()
        todo = [c for c in wanted if (given.what, spec.name, c) not in rows]
        if not todo:
            continue
        with progress_bar() as progress:
            for row in measure(
                load_teacher(spec),
                corpus,
                todo,
                runs,
                calibrate=calibrate,
                images=images,
                student_grid=given.student_grid,
                student_width=given.student_width,
                progress=progress,
            ):
                when = {"date": time.strftime("%Y-%m-%d"), "corpus": corpus.fingerprint()}
                rows[given.what, spec.name, row["codec"]] = {"what": given.what} | row | when
                text = json.dumps({"machine": machine(), "rows": list(rows.values())}, indent=1)
                given.results.write_text(text + "\n")
    _show(list(rows.values()))


def _mean(cosine: Row | None) -> str:
    return "-" if cosine is None else f"{cosine['mean']:.4f}"


def _show(rows: Sequence[Row]) -> None:
    whole = [row for row in rows if "refused" not in row]
    names = list(dict.fromkeys(name for row in whole for name in row["gradient_cosine"]))
    print_table(
        "Bits against error",
        ["images", "teacher", "codec", "KB per image", "of float16", "energy", "token", *names],
        [
            [
                row["what"],
                row["teacher"],
                row["codec"],
                f"{row['row_bytes'] / 1e3:.1f}",
                f"{row['over_float16']:.3f}",
                f"{row['energy_error']:.3%}",
                f"{row['token_error']:.2%}",
                *(_mean(row["gradient_cosine"].get(name)) for name in names),
            ]
            for row in whole
        ],
    )
    for row in rows:
        if "refused" in row:
            print(f"{row['teacher']}, {row['codec']}: {row['refused']}")


if __name__ == "__main__":
    from movekd.cli.failures import run_guarded

    run_guarded(main)
