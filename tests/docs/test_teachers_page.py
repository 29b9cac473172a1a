"""The steps of docs/teachers.md work on a tiny corpus, and its table matches the specs."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from forked import follow, run
from movekd.analysis.plan import output_shape
from movekd.cache.layout import teacher_layout
from movekd.cache.reader import open_cache
from movekd.cache.spec import load_spec, shipped_specs

PAGE = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def environment(**more: str) -> dict[str, str]:
    """Return what a reader's shell exports; no command finds the current folder by itself."""
    found = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return found | {"COLUMNS": "160"} | more


@pytest.fixture
def folder(tmp_path, corpus_dir) -> Path:
    """Return a folder with a corpus and the page's files, named by their first lines."""
    shutil.copytree(corpus_dir, tmp_path / "data")
    for content in (*blocks("yaml"), *blocks("python")):
        first, _, _ = content.partition("\n")
        (tmp_path / first.removeprefix("# ")).write_text(content)
    return tmp_path


def test_the_page_has_the_blocks_that_are_followed(folder) -> None:
    files = {path.name for path in folder.iterdir()}
    of_provider = {"patch_provider.py", "build_patch.py", "patch.yaml"}
    of_network = {"my_encoders.py", "save_weights.py", "stripes.yaml"}
    assert files == {"data", "dino_small.yaml"} | of_network | of_provider
    assert len(blocks("sh")) == 4
    assert len(blocks("yaml")[0].splitlines()) == 1 + 10, "ten lines, says the page"
    load_spec(str(folder / "dino_small.yaml"))


def test_a_model_of_a_library_step_by_step(folder) -> None:
    printed = follow(blocks("sh")[0], folder, environment())
    words = printed.replace("│", " ").split()  # the table folds the state
    assert "RANDOM" in words
    assert "WEIGHTS" in words
    store = open_cache(folder / "trial")["dino_small"]
    targets = store.read([0, 5])
    assert targets.tokens_BND.shape == (2, 256, 384)
    assert targets.cls_BD is not None
    assert targets.cls_attention_BHN is not None
    assert store.spec.weights == "random"


def test_a_network_of_one_s_own_step_by_step(folder) -> None:
    build, check = blocks("sh")[1:3]
    follow(build, folder, environment())
    store = open_cache(folder / "cache")["stripes"]
    assert store.read([0]).tokens_BND.shape == (1, 16, 32)
    assert store.read([0]).cls_BD is not None
    assert store.spec.factory == "my_encoders:stripes"
    assert "no problems" in follow(check, folder, environment(PYTHONPATH="."))
    words = shlex.split(check.replace("./stripes.yaml", "stripes"))
    done = run(["-m", *words], cwd=folder, env=environment())
    assert "code is not run because a cache names it" in " ".join(done.stdout.split())
    assert done.returncode == 1


def test_a_provider_of_one_s_own_step_by_step(folder) -> None:
    assert follow(blocks("sh")[3], folder, environment()) == "patch 24\n"
    store = open_cache(folder / "cache")["patch"]
    assert store.spec.provider == "patch"
    assert store.read([0]).tokens_BND.shape == (1, 16, 32)


def test_the_table_is_that_of_the_specs() -> None:
    rows = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0] in shipped_specs():
            rows[cells[0]] = cells
    assert list(rows) == list(shipped_specs())
    for name, (_, _, size, shape, cls, attention, megabytes) in rows.items():
        spec = load_spec(name)
        found = output_shape(spec)
        num_tokens, width, cls_width, num_heads = found
        assert int(size) == spec.image_size
        assert shape == f"{num_tokens} x {width}"
        expected = {"token": "token", "attention_pool": "pooling head"}[spec.cls_source]
        assert cls.split(",")[0] == (expected if spec.cls else "-")
        assert attention == (f"{num_heads} heads" if spec.cls_attention else "-")
        stored_heads = None if num_heads is None else 1  # of a new cache: their mean
        layout = teacher_layout(
            spec.codec, num_tokens, width, cls_width=cls_width, num_heads=stored_heads
        )
        assert float(megabytes) == pytest.approx(layout.row_bytes / 1e6, abs=0.0051)
