"""What must not happen to a cache: memory that grows, damage that nobody sees, a lost build.

Each part runs in a separate process (``python cache_safety.py PART FOLDER`` prints one JSON
line): peak memory is a process's, and only one that has never started a thread may fork builds.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from movekd.cache import layout
from movekd.cache.spec import CacheSpec, load_spec
from movekd.cache.verify import verify
from movekd.cli.main import main as movekd
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.extract.image_loader import image_transform, pixel_batches
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.teachers import load_teacher
from report import Figure

NUM_FLIPS, NUM_KILLS = 1000, 50
PEAK_IMAGES, BATCH = 136, 16
TINY = {
    "name": "clip",
    "provider": "transformers",
    "model": "tiny-clip",
    "model_args": {
        "model_type": "clip_vision_model",
        "hidden_size": 192,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 4,
    },
    "image_size": 48,
    "layer": -2,
    "cls": True,
    "cls_attention": True,
    "weights": "random",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "calibration_images": 24,
}


def run_part(part: str, folder: Path) -> dict[str, Any]:
    """Run one part below in a separate process and return what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, part, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_figures(folder: Path) -> list[Figure]:
    """Peak memory of a build over that of its teacher by itself."""
    corpus(folder, PEAK_IMAGES, 336)
    teacher, build = run_part("teacher", folder), run_part("build", folder)
    shard_gib = build["shard_bytes"] / 2**30
    return [
        Figure(
            "build_peak_over_teacher_gib",
            build["own_gib"] - teacher["own_gib"],
            f"peak memory of a build ({build['own_gib']:.2f} GiB; CLIP-L/336 with 2 blocks, batch "
            f"{BATCH}, rows of full size) over that of loading the teacher and one batch forward "
            f"({teacher['own_gib']:.2f}); the target is a Zarr shard ({shard_gib:.2f} GiB) + 1 GiB",
            at_most=round(shard_gib + 1, 2),
        ),
        Figure(
            "decode_worker_peak_gib",
            build["worker_gib"],
            "of its process that decodes images, beside it; what it shares with the build counts",
        ),
    ]


def flip_figures(folder: Path) -> list[Figure]:
    """Bytes flipped anywhere in a small cache, one at a time, and found by verify."""
    found = run_part("flips", folder)
    print(f"  flips found: {found['found']} of {found['made']}")
    what = f"single bytes flipped in the {found['files']} files of a cache, one at a time"
    return [
        Figure("flips_made", found["made"], what, at_least=NUM_FLIPS),
        Figure("flips_found", found["found"], "of them, by verify", at_least=found["made"]),
    ]


def kill_figures(folder: Path) -> list[Figure]:
    """Builds killed at random instants, resumed, and compared with an undisturbed one."""
    found = run_part("kills", folder)
    print(f"  kills: {found['identical']} of {found['made']} byte-identical after the resume")
    what = (
        f"`movekd cache build` ended by SIGKILL at random instants of its {found['seconds']:.1f} s "
        f"({found['unfinished']} before it was done)"
    )
    return [
        Figure("kills_made", found["made"], what, at_least=NUM_KILLS),
        Figure(
            "kills_identical",
            found["identical"],
            "of them resumed to the very bytes of an undisturbed build",
            at_least=found["made"],
        ),
    ]


def corpus(folder: Path, num_images: int, side: int) -> None:
    """Pack crops of two photographs."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    photos = load_sample_images().images
    for number in range(num_images):
        photo = photos[number % 2]
        top = generator.integers(0, photo.shape[0] - side)
        left = generator.integers(0, photo.shape[1] - side)
        crop = Image.fromarray(photo[top : top + side, left : left + side])
        crop.save(folder / "images" / f"{number:03d}.png")
    pack_folder(folder / "images", folder / "corpus", num_workers=1)


def peak_gib() -> float:
    """Return this process's peak memory; getrusage would begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def part_teacher(folder: Path) -> dict[str, Any]:
    """Load the teacher and run one batch."""
    spec = peak_spec()
    images = image_transform(spec, "crop")
    batches = [list(range(BATCH))]
    batch = next(
        iter(pixel_batches(open_corpus(folder / "corpus"), images, batches, num_workers=0))
    )
    load_teacher(spec).forward(batch.pixels("cpu"))
    return {"own_gib": peak_gib()}


def part_build(folder: Path) -> dict[str, Any]:
    """Build the cache."""
    import resource

    options = BuildOptions(batch_size=BATCH, num_workers=1)
    data, specs = open_corpus(folder / "corpus"), [peak_spec()]
    for _ in build_cache(folder / "cache", data, specs, geometry="crop", options=options):
        pass
    files = (folder / "cache" / layout.group_name("clip")).glob("*/c/0/**/0")
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    shard = sum(path.stat().st_size for path in files if path.is_file())
    return {"own_gib": peak_gib(), "worker_gib": worker, "shard_bytes": shard}


def peak_spec() -> CacheSpec:
    """Return the shipped ``clip`` with two blocks: rows of full size, a tenth of the work."""
    spec = load_spec("clip")
    return spec.with_changes(
        weights="random",
        model_args=spec.model_args | {"num_hidden_layers": 2},
        calibration_images=BATCH,
    )


def part_flips(folder: Path) -> dict[str, Any]:
    """Flip one byte, verify, flip it back; each file as likely as any other."""
    build = tiny_build(folder, num_images=12)
    build(folder / "cache")
    cache, draw = folder / "cache", random.Random(0)
    assert list(verify(cache)) == []
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.stat().st_size]
    found = 0
    for _ in range(NUM_FLIPS):
        path = draw.choice(files)
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        found += bool(list(verify(cache)))
        path.write_bytes(content)
    assert list(verify(cache)) == []
    return {"found": found, "made": NUM_FLIPS, "files": len(files)}


def part_kills(folder: Path) -> dict[str, Any]:
    """Kill builds, resume them, compare."""
    build = tiny_build(folder, num_images=64)
    load_teacher(load_spec(str(folder / "clip.yaml")))  # its libraries imported before the forks
    started = time.perf_counter()
    _wait(_fork(lambda: build(folder / "undisturbed")))
    seconds = time.perf_counter() - started
    expected, draw = contents(folder / "undisturbed"), random.Random(0)
    identical = unfinished = 0
    for number in range(NUM_KILLS):
        cache = folder / f"{number}"
        child = _fork(lambda cache=cache: build(cache))  # type: ignore[misc]
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        unfinished += _wait(child) != 0
        while _wait(_fork(lambda cache=cache: build(cache))):  # type: ignore[misc]
            if time.perf_counter() - started > 600:
                raise SystemExit(f"{cache} cannot be resumed")
        identical += contents(cache) == expected
        shutil.rmtree(cache)
    return {
        "made": NUM_KILLS,
        "identical": identical,
        "unfinished": unfinished,
        "seconds": seconds,
    }


def tiny_build(folder: Path, num_images: int) -> Callable[[Path], None]:
    """Return the command `movekd cache build` of a tiny teacher in Zarr shards of eight rows."""
    layout.MAX_SHARD_ROWS = 8
    torch.set_num_threads(1)  # a fork after OpenMP has started would hang
    corpus(folder, num_images, 48)
    (folder / "clip.yaml").write_text(yaml.safe_dump(TINY))

    def build(cache: Path) -> None:
        sys.argv = [
            *("movekd", "cache", "build", "--teacher", str(folder / "clip.yaml")),
            *("--shards", str(folder / "corpus"), "--cache", str(cache)),
            *("--batch-size", "8", "--num-workers", "1", "--device", "cpu"),
        ]
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            try:
                movekd()
            except SystemExit as end:
                if end.code:
                    raise

    return build


def contents(cache: Path) -> dict[str, bytes]:
    """Return every file of a cache."""
    files = (path for path in cache.rglob("*") if path.is_file())
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    with contextlib.suppress(BaseException):
        work()
        status = 0
    os._exit(status)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


PARTS = {
    "teacher": part_teacher,
    "build": part_build,
    "flips": part_flips,
    "kills": part_kills,
}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](Path(sys.argv[2]))))
