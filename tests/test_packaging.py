"""A wheel that works without the checkout beside it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_wheel_finds_its_specs_and_pipelines(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "import movekd, movekd.cache.spec as spec, movekd.resources as resources\n"
        "print(movekd.__file__)\n"
        "print(','.join(spec.shipped_specs()))\n"
        "assert (resources.resource_dir('pipelines') / 'digits' / 'demo.py').is_file()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    where, specs = done.stdout.split()
    assert where.startswith(str(installed))
    assert specs == ",".join(sorted(path.stem for path in (ROOT / "cache_specs").glob("*.yaml")))
