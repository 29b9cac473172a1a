"""Bring packages to a GPU machine without a network: fetch their wheels here, install them there.

    python benchmarks/gpu/wheelhouse.py fetch      here: into .wheels/, for Python 3.12 on x86-64
    python3 benchmarks/gpu/wheelhouse.py install   there: from .wheels/ into .wheels-site/; movekd
                                                   itself stays in the tree

``fetch`` takes the versions of constraints.txt. It fails if a wheel needs a package that the
machine lacks, or if wheels and tree together exceed what may travel. torch is never fetched: its
build fits the machine's driver. The file uses only Python's standard library.
"""

import argparse
import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS, SITE = ROOT / ".wheels", ROOT / ".wheels-site"
LIMIT_BYTES = 64 * 2**20
PYTHON = "3.12"
PLATFORMS = ("2_28", "2_27", "2_17", "2_34", "2_31", "2_24")
"""Versions of glibc; pip compares them exactly."""
FETCHED = (
    *("zarr", "donfig", "numcodecs", "google-crc32c"),
    *("open-clip-torch", "ftfy", "wcwidth"),
    *("transformers", "peft", "timm", "regex"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("typer", "rich-pixels", "openpyxl", "et-xmlfile"),
)
"""What the machine lacks, or has in a version that movekd refuses."""
THERE = (
    *("torch", "torchvision", "numpy", "pillow", "pyyaml", "packaging", "rich", "shellingham"),
    *("annotated-doc", "tqdm", "psutil", "accelerate", "safetensors", "huggingface-hub"),
    *("tokenizers", "sentencepiece", "protobuf", "tensorstore", "fsspec", "xxhash", "pyarrow"),
    *("matplotlib", "jinja2", "tensorboard"),
)
"""What movekd and the fetched ones need, and the machine has."""


def main() -> None:
    """Fetch or install."""
    parser = argparse.ArgumentParser(description="Wheels for a machine without a network.")
    parser.add_argument("what", choices=("fetch", "install"))
    if parser.parse_args().what == "fetch":
        fetch()
    else:
        install()


def fetch() -> None:
    """Download the wheels into ``.wheels/`` and check them."""
    WHEELS.mkdir(exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp"]
    options += [f"--python-version={PYTHON}", "--platform=manylinux2014_x86_64", *platforms]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", *options]
    subprocess.run([*pip, f"--dest={WHEELS}", *pinned(FETCHED)], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if missing := missing_needs(WHEELS, project["dependencies"]):
        sys.exit(f"needed, neither fetched nor on the machine: {', '.join(missing)}")
    wheels, tree = folder_bytes(WHEELS), tree_bytes()
    print(f"{wheels / 2**20:.1f} MiB of wheels, {tree / 2**20:.1f} MiB of tree")
    if wheels + tree > LIMIT_BYTES:
        sys.exit(f"together they exceed {LIMIT_BYTES // 2**20} MiB")


def install() -> None:
    """Install all wheels of ``.wheels/`` into ``.wheels-site/``; put that on PYTHONPATH."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    names = sorted({wheel_name(path) for path in WHEELS.glob("*.whl")})
    if not names:
        sys.exit(f"{WHEELS} holds no wheel; run `fetch` where PyPI can be reached")
    where = [f"--find-links={WHEELS}", f"--target={SITE}", "--upgrade"]
    subprocess.run([*pip, *where, *names], check=True)
    version = re.search(r'__version__ = "(.*)"', (ROOT / "movekd" / "__init__.py").read_text())
    assert version is not None
    record = SITE / f"movekd-{version[1]}.dist-info"  # a cache records the version; code: the tree
    record.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: movekd\nVersion: {version[1]}\n"
    (record / "METADATA").write_text(metadata, encoding="utf-8")


def pinned(names: tuple[str, ...]) -> list[str]:
    """Return ``name==version`` of constraints.txt; a name that it does not pin stays as it is."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonical(line.partition("==")[0]): line.strip() for line in lines if "==" in line}
    return [pins.get(name, name) for name in names]


def missing_needs(folder: Path, more: list[str]) -> list[str]:
    """Return what wheels, and ``more``, need and what is neither in the folder nor there."""
    paths, needs = list(folder.glob("*.whl")), list(more)
    for path in paths:
        with zipfile.ZipFile(path) as wheel:
            (metadata,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
            needs += email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist") or []
    missing = set()
    for need in needs:
        if "extra ==" not in need and "Windows" not in need and "win32" not in need:
            found = re.match(r"[\w.-]+", need)
            assert found is not None
            missing.add(canonical(found[0]))
    return sorted(missing - {*THERE, *(wheel_name(path) for path in paths)})


def wheel_name(path: Path) -> str:
    """Return the name of a wheel's package."""
    return canonical(path.name.partition("-")[0])


def canonical(name: str) -> str:
    """Return a package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tree_bytes() -> int:
    """Return the bytes of the files that git tracks, or would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    paths = {ROOT / name.decode() for name in names.split(b"\0") if name}
    return sum(path.stat().st_size for path in paths if path.is_file())


if __name__ == "__main__":
    main()
