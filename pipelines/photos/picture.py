"""Draw docs/images/photographs.png: three real teachers look at a photograph.

    python pipelines/photos/picture.py [--photograph astronaut] [--output FILE]

Input: photographs that scikit-image's wheel holds, weights of ``weights.py``. Steps: pack, build,
``cache show``. Output: the sheet in 256 colours, smaller than 300 kB.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from skimage import data

from movekd.errors import ConfigError
from weights import make_weights

HERE = Path(__file__).resolve().parent
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket")
IMAGE_SIZES = {"vit_s": 448, "efficientnet_lite0": 448, "hed": 448}
"""Larger than the specs' sizes: 32, 14 and 28 tokens per side."""
MAX_BYTES = 300_000


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photograph", choices=PHOTOGRAPHS, default="astronaut")
    parser.add_argument("--weights", type=Path, default=Path("demo-real/weights"))
    parser.add_argument("--output", type=Path, default=Path("docs/images/photographs.png"))
    given = parser.parse_args()
    given.weights.mkdir(parents=True, exist_ok=True)
    folders = make_weights(given.weights.resolve(), IMAGE_SIZES)
    with tempfile.TemporaryDirectory() as work:
        draw(given.photograph, folders, Path(work), given.output)


def draw(photograph: str, folders: dict[str, Path], work: Path, output: Path) -> None:
    """Build a cache of all photographs in ``work``; write the sheet of one to ``output``.

    Raises:
        ConfigError: the picture is larger than ``MAX_BYTES``.
    """
    images = work / "images"
    images.mkdir()
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(data, name)()).convert("RGB").save(images / f"{name}.png")
    specs: list[Any] = []
    for teacher, folder in folders.items():
        content = yaml.safe_load((HERE / "teachers" / f"{teacher}.yaml").read_text("utf-8"))
        content |= {"weights": str(folder), "image_size": IMAGE_SIZES[teacher]}
        spec = work / f"{teacher}.yaml"
        spec.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        specs += ["--teacher", spec]
    places = ("--shards", work / "data", "--cache", work / "cache")
    movekd("shards", "pack", "--images", images, "--output", work / "data")
    movekd("cache", "build", *specs, *places)
    shown = ("--key", f"{photograph}.png", "--output", work / "sheets")
    movekd("cache", "show", *places, *shown)
    (sheet,) = (work / "sheets").glob("*.png")
    picture = Image.open(sheet).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(output, optimize=True)
    if (size := output.stat().st_size) > MAX_BYTES:
        raise ConfigError(
            f"{output} has {size:,} bytes; expected {MAX_BYTES:,}. Choose another photograph."
        )
    print(f"{output}: {size:,} bytes")


def movekd(*words: Any) -> None:
    """Run a `movekd` command that finds ``hed``."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "movekd", *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


if __name__ == "__main__":
    from movekd.cli.failures import run_guarded

    run_guarded(main)
