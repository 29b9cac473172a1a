"""The wheel works without the checkout; the files of a release are consistent."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def movekd(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the command of the wheel, installed into a new environment.

    Dependencies come from this environment through a .pth file; the checkout does not.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    here = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=here))
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    subprocess.run([*install, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "movekd"


def run(command: Path, folder: Path, *words: str) -> str:
    """Run the installed command in ``folder``; return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [command, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_no_tests_and_all_of_the_rest(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    specs = {path.name for path in (ROOT / "cache_specs").glob("*.yaml")}
    assert specs == {n.rpartition("/")[2] for n in names if "/cache_specs/" in n}
    assert "movekd/_resources/pipelines/digits/demo.py" in names
    assert not [name for name in names if name.startswith("tests/")]
    assert wheel.stat().st_size < 8e6  # the demo's weights are half of it; no study's are in it


def test_an_installed_wheel_shows_help_and_plans_with_its_specs(
    movekd: Path, crops: list[Image.Image], tmp_path: Path
) -> None:
    assert "shards" in run(movekd, tmp_path, "--help")
    assert run(movekd, tmp_path, "--version").strip() == PROJECT["version"]
    python = [str(movekd.parent / "python"), "-c", "import movekd; print(movekd.__file__)"]
    where = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert where.stdout.startswith(str(movekd.parent.parent))

    (tmp_path / "images").mkdir()
    for number, crop in enumerate(crops[:3]):
        crop.save(tmp_path / f"images/{number}.png")
    run(movekd, tmp_path, "shards", "pack", "--images", "images", "--out", "data")
    specs = sorted(path.stem for path in (ROOT / "cache_specs").glob("*.yaml"))
    words = [word for name in specs for word in ("--teacher", name)]
    assumed = ("--assume-rate", "100", "--no-measure-disk", "--num-images", "558000", "--json")
    planned = json.loads(
        run(movekd, tmp_path, "cache", "plan", *words, "--shards", "data", *assumed)
    )
    assert sorted({row["teacher"] for row in planned["teachers"]}) == specs
    assert planned["num_images"] == 558000


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["cff-version"] == "1.2.0"


def test_hooks_and_forms_are_read_as_they_are_meant() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"].split()[0] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert set(entries) == {".venv/bin/ruff", "make"}
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 4
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert form.stem == "config" or {"name", "description", "body"} <= set(content)
