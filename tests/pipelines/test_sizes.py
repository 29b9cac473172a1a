"""Sizes in the READMEs of the pipelines, and in the comments of specs, are those of the plan."""

import re
from functools import cache

import pytest

from movekd.analysis.plan import output_shape, storage_options
from movekd.cache.layout import grid_side
from movekd.cache.spec import load_spec, shipped_specs
from movekd.resources import resource_dir
from pipeline_readme import PIPELINES

TABLE = re.compile(r"^\| (\w+) \| (\d+)x\2x\d+.* \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
TOTAL = re.compile(r"^\| all \| \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
READMES = sorted(
    path for path in PIPELINES.glob("*/README.md") if TABLE.search(path.read_text(encoding="utf-8"))
)


@cache
def row_megabytes(teacher: str, grid: int) -> tuple[float, float]:
    """Return MB per image in int8 and in float16."""
    spec = load_spec(teacher)
    shape = output_shape(spec)
    assert grid in {24, grid_side(shape.num_tokens)}
    sizes = {(o.codec, o.grid): o.arrays.row_bytes for o in storage_options(spec, shape, 24, {})}
    return sizes["int8", grid] / 1e6, sizes["float16", grid] / 1e6


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_the_sizes_of_a_readme_are_the_plans(path):
    text = path.read_text(encoding="utf-8")
    rows = TABLE.findall(text)
    assert len(rows) >= 3
    found = [row_megabytes(teacher, int(grid)) for teacher, grid, *_ in rows]
    assert [cells for _, _, *cells in rows] == [[f"{size:.2f}" for size in row] for row in found]
    (total,) = TOTAL.findall(text)
    assert total == tuple(f"{sum(sizes):.2f}" for sizes in zip(*found, strict=True))
    assert "not run at full size" in " ".join(text.lower().split())


@pytest.mark.parametrize("teacher", shipped_specs())
def test_the_sizes_in_the_comment_of_a_spec_are_the_plans(teacher):
    text = (resource_dir("cache_specs") / f"{teacher}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line[:1] == "#")
    (cells,) = re.findall(r"([\d.]+) MB per image in int8, ([\d.]+) in float16", comment)
    grid = grid_side(output_shape(load_spec(teacher)).num_tokens)
    found = row_megabytes(teacher, grid)
    assert [float(cell) for cell in cells] == [
        round(size, len(cell.partition(".")[2])) for cell, size in zip(cells, found, strict=True)
    ]
