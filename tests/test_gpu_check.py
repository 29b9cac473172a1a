"""`make gpu-check`, shrunken on a CPU, and the wheels that it takes along."""

import json
import os
import subprocess
import sys
import zipfile
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEYS = {
    *("mole_minus_loop", "mole_over_plain", "mole_over_loop"),
    *("float16_decode_gb_s", "int8_decode_gb_s", "int4_decode_gb_s", "lowrank64_decode_difference"),
    *("fsdp2_loss_difference", "fsdp2_sharded_share", "fsdp2_step_s"),
    *("resident_step_s", "cached_step_s", "live_step_s", "cached_over_resident"),
    *("cached_peak_gib", "live_peak_gib", "teacher_bytes_on_device"),
    *("build_over_forward_clip", "build_over_forward_eva02", "build_over_forward_sam"),
    *("build_over_forward_convnext", "cls_attention_max_error"),
}
EXACT = {"fsdp2_sharded_share": 1, "teacher_bytes_on_device": 0, "int4_decode_difference": 0}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpu.check", "--smoke", "--output", tmp_path],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT / "benchmarks",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert set(found["figures"]) >= KEYS
    assert {name: found["figures"][name] for name in EXACT} == EXACT
    assert list(found["parts"]) == ["mole", "codecs", "fsdp", "train", "build"]
    assert {part["ended"] for part in found["parts"].values()} == {"whole"}


@pytest.fixture(scope="module")
def wheelhouse():
    path = ROOT / "benchmarks" / "gpu" / "wheelhouse.py"
    spec = util.spec_from_file_location("wheelhouse", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_wheel_has_the_version_of_the_constraints(wheelhouse) -> None:
    pinned = wheelhouse.pinned(wheelhouse.FETCHED)
    assert [word.partition("==")[0] for word in pinned] == list(wheelhouse.FETCHED)
    assert "transformers==5.23.0" in pinned
    assert [word for word in pinned if "==" not in word] == []


def test_what_a_wheel_needs_and_nobody_brings_is_found(wheelhouse, tmp_path) -> None:
    needs = (
        "numpy>=2",
        "Foo_Bar (>=1)",
        "rich; extra == 'all'",
        "baz",
        "colorama; os == 'Windows'",
    )
    with zipfile.ZipFile(tmp_path / "baz-1.0-py3-none-any.whl", "w") as wheel:
        lines = [f"Requires-Dist: {need}" for need in needs]
        wheel.writestr("baz-1.0.dist-info/METADATA", "\n".join(["Name: baz", *lines, "", "text"]))
    assert wheelhouse.missing_needs(tmp_path, ["qux>=1"]) == ["foo-bar", "qux"]
