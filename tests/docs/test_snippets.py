"""The Python code of the docs runs as it is printed.

Code of the pages on the cache runs without movekd and without a warning.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

import forked
from movekd.cache.reader import open_cache

DOCS = Path(__file__).parents[2] / "docs"
WITHOUT_MOVEKD = 'import sys; sys.modules["movekd"] = None\n'


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_MOVEKD + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), code
    return done.stdout


@pytest.fixture
def folder(tmp_path, cache_dir) -> Path:
    shutil.copytree(cache_dir, tmp_path / "cache")
    return tmp_path


def test_every_way_of_inspecting_works(folder) -> None:
    printed = [run(code, folder) for code in snippets("inspecting.md")]
    assert len(printed) == 7
    assert "token_scale (24, 16, 2) float16 ('row', 'token', 'group')" in printed[0]
    assert "tiny-clip int8" in printed[0]
    assert "'row': 24" in printed[2]
    assert "[(16, 144), (16, 144), (16, 144)]" in printed[3]
    assert "photos/" in printed[4]
    assert "0 rows" in printed[5]
    assert "00000.json [0, 24]" in printed[6]


def test_the_reader_of_the_format_page_reads_what_movekd_reads(folder, cache_dir) -> None:
    *_, code = snippets("cache-format.md")
    assert run(code, folder) == "(16, 144)\n"
    cache = open_cache(cache_dir)
    for teacher in cache:
        save = "\nfor row in range(24):\n    np.save(f'{row}.npy', read_tokens(row))\n"
        run(code.replace("clip.zarr", f"{teacher}.zarr") + save, folder)
        found = np.stack([np.load(folder / f"{row}.npy") for row in range(24)])
        expected = cache[teacher].read(range(24)).tokens_BND.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_the_page_on_the_student_works_from_top_to_bottom(tmp_path) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, **sizes)
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    # PEFT uses names that transformers deprecates, and both show progress: no -W error here
    done = forked.run(["-c", "".join(snippets("student.md"))], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trainable params" in done.stdout
    assert "torch.Size([4, 4])" in done.stdout
