"""Make a world: a split of the handwriting, teachers trained on it, scenes, caches of features.

    WORK/worldN/
      weights/         the shipped weights; at other sizes trained here by the same recipe
      teachers/ *.yaml the pipeline's files, beside the weights
      source/          pretrain.json, finetune.json, val.json, images/; no test scenes
      data/            the packed corpus
      caches/NAME/     those of plan.CACHES and plan.DERIVED that arms need
      test/            test scenes; only the final pass draws them
      test_clutter/ test_noise/   the same questions about scenes as no training has
      probe/           scenes of one digit, train/DIGIT/ and test/DIGIT/, for `movekd probe`
      caches/NAME.seconds   CPU seconds that a cache took, interrupted builds included

Everything is made once and kept. All worlds share the language model. It has seen no image, only
which patches of a cell the training handwriting of world 0 covers.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pretrain
import scenes
from demo import HERE, TEACHERS
from movekd.cache.spec import load_spec
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.extract.options import BuildOptions
from movekd.extract.recode import recode_cache
from movekd.extract.run import build_cache
from study import controls
from study.plan import CACHES, DERIVED, Sizes
from study.results import RESULTS

YAMLS = ("pretrain.yaml", "finetune.yaml")
UNSEEN_LOOKS = tuple(look for look in scenes.LOOKS if look != "plain")
"""Looks of scenes that no training has."""
WEIGHTS = RESULTS.with_name("teachers")
"""Teachers of the worlds except 0. Training on another machine would change the last bits."""


@dataclass(frozen=True)
class World:
    """The folders of a world. Its number seeds the split, the teachers and the scenes."""

    number: int
    work: Path
    sizes: Sizes

    @property
    def folder(self) -> Path:
        """Folder of this world."""
        return self.work / f"world{self.number}"

    @property
    def shipped_weights(self) -> Path | None:
        """Folder of shipped weights; None if none have this size."""
        if self.number == 0:
            return HERE / "weights"
        shipped = WEIGHTS / f"world{self.number}"
        return shipped if self.sizes.teacher_steps is None and shipped.exists() else None

    @property
    def source(self) -> Path:
        """Scenes as LLaVA JSON and images."""
        return self.folder / "source"

    @property
    def data(self) -> Path:
        """Scenes as shards."""
        return self.folder / "data"

    def cache(self, name: str) -> Path:
        """Folder of a cache."""
        return self.folder / "caches" / name

    def teacher_seconds(self, cache: str) -> float:
        """Seconds of one core that the teachers' training and the building of a cache took."""
        path = self.folder / "weights/training.json"
        trained = json.loads(path.read_text(encoding="utf-8"))
        built = json.loads(_seconds_file(self, cache).read_text(encoding="utf-8"))
        return float(sum(trained[name]["seconds"] for name in TEACHERS) + built)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights and scenes; part of a row's settings."""
        digest = hashlib.sha256((self.folder / "weights/SHA256SUMS").read_bytes())
        for path in sorted(self.source.rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]


def train_teacher(world: World, name: str) -> None:
    """Train a teacher of a world, unless it exists."""
    weights = world.folder / "weights"
    trained = weights / "training.json"
    if trained.exists() and name in json.loads(trained.read_text(encoding="utf-8")):
        return
    seed = world.number
    part = world.folder / "training" / name  # two teachers of a world may train at once
    pretrain.pretrain(part, name, seed, world.sizes.teacher_steps, split_seed=seed)


def collect_weights(world: World) -> None:
    """Collect the weights of a world, with the pipeline's YAML files beside them.

    Teachers that were trained here at full size are copied to ``WEIGHTS``, to be committed with the
    rows that they made.
    """
    weights = world.folder / "weights"
    world.folder.mkdir(parents=True, exist_ok=True)
    language_model = HERE / "weights/language_model"
    shutil.copytree(language_model, weights / "language_model", dirs_exist_ok=True)
    if world.shipped_weights is not None:
        shutil.copytree(world.shipped_weights, weights, dirs_exist_ok=True)
    else:
        for part in sorted((world.folder / "training").glob("*")):
            result = json.loads((part / "training.json").read_text(encoding="utf-8"))[part.name]
            shutil.copytree(part / part.name, weights / part.name, dirs_exist_ok=True)
            pretrain.record_training(weights, part.name, result)
        if world.sizes.teacher_steps is None:
            kept = WEIGHTS / f"world{world.number}"
            is_shared = shutil.ignore_patterns("language_model")
            shutil.copytree(weights, kept, ignore=is_shared, dirs_exist_ok=True)
        shutil.rmtree(world.folder / "training", ignore_errors=True)
    shutil.copytree(HERE / "teachers", world.folder / "teachers", dirs_exist_ok=True)
    for name in YAMLS:
        shutil.copy(HERE / name, world.folder / name)


def write_scenes(world: World) -> None:
    """Draw and pack the training scenes, and draw the validation scenes; no test scenes.

    Raises:
        SystemExit: the folder holds a world of other sizes.
    """
    sizes, stamp = world.sizes, world.folder / "scenes.json"
    wanted = {"sizes": [sizes.num_pretrain, sizes.num_finetune, sizes.num_val]}
    if stamp.exists():
        if json.loads(stamp.read_text(encoding="utf-8")) != wanted:
            raise SystemExit(
                f"study: {world.folder} was made with other sizes; delete it, or give another "
                "--work."
            )
        return
    for folder in (world.source, world.data, world.folder / "caches"):
        shutil.rmtree(folder, ignore_errors=True)
    scenes.write_corpus(
        world.source,
        num_pretrain=sizes.num_pretrain,
        num_finetune=sizes.num_finetune,
        num_val=sizes.num_val,
        num_test=0,
        seed=world.number,
        split_seed=world.number,
    )
    stages = [world.source / f"{stage}.json" for stage in ("pretrain", "finetune")]
    pack_llava(stages, world.source / "images", world.data, num_workers=1)
    stamp.write_text(json.dumps(wanted) + "\n", encoding="utf-8")


def write_test_scenes(world: World, look: str = "plain") -> Path:
    """Draw the test scenes, unless they exist; return their folder. Only for the final pass."""
    folder = world.folder / ("test" if look == "plain" else f"test_{look}")
    if not (folder / "test.json").exists():
        number = world.number
        scenes.write_corpus(
            folder,
            num_pretrain=0,
            num_finetune=0,
            num_val=0,
            num_test=world.sizes.num_test,
            seed=number,
            split_seed=number,
            look=scenes.LOOKS[look],
        )
    return folder


def write_more_tests(world: World) -> None:
    """Draw what only main arms are measured with: two unseen looks, and the scenes of a probe."""
    for look in UNSEEN_LOOKS:
        write_test_scenes(world, look)
    write_probe(world)


def write_probe(world: World) -> Path:
    """Draw scenes of one digit each, unless they exist; return their folder."""
    folder = world.folder / "probe"
    if not folder.exists():
        begun = folder.with_name("probe.begun")
        shutil.rmtree(begun, ignore_errors=True)
        scenes.write_single_digits(begun, world.sizes.num_probe, world.number, world.number)
        begun.rename(folder)
    return folder


def build(world: World, name: str) -> None:
    """Build a cache of a world, or resume its build; one that is derived needs its source."""
    if name == "shuffled":
        controls.shuffle_cache(world.cache(DERIVED[name]), world.cache(name), world.number)
        return
    if name == "labels":
        counts: dict[scenes.Part, int] = {
            "pretrain": world.sizes.num_pretrain,
            "finetune": world.sizes.num_finetune,
        }
        controls.label_cache(world.cache(DERIVED[name]), world.cache(name), counts, world.number)
        return
    if name in DERIVED:
        source, codec = world.cache(DERIVED[name]), name.removeprefix("recoded_")
        for _ in recode_cache(str(source), str(world.cache(name)), codec):
            pass
        return
    paths = [world.folder / "teachers" / f"{teacher}.yaml" for teacher in TEACHERS]
    specs = [load_spec(str(path)).with_changes(**CACHES[name]) for path in paths]
    options = BuildOptions(batch_size=64, num_workers=0, device="cpu")
    corpus, noted = open_corpus(world.data), _seconds_file(world, name)
    begun = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else 0.0
    started = time.process_time()
    for _ in build_cache(world.cache(name), corpus, specs, geometry="crop", options=options):
        seconds = begun + time.process_time() - started
        noted.write_text(f"{seconds:.1f}\n", encoding="utf-8")


def _seconds_file(world: World, cache: str) -> Path:
    return world.folder / "caches" / f"{cache}.seconds"
