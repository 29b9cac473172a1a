"""The tables of docs/scaling.md are what its commands print; its examples are valid."""

import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from movekd.cli.main import app
from movekd.corpus.index import open_corpus

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "scaling.md").read_text(encoding="utf-8")
SIZES = ("558,000", "1,200,000", "12,000,000", "1,000,000,000")
TEACHERS = ("clip", "eva02", "convnext", "sam")
SHOWN = ("float16", "int8")
"""Codecs whose bytes the page shows per teacher; of the others it shows the totals."""
Plan = dict[str, Any]


@pytest.fixture(scope="module")
def plans(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Plan]:
    """Return the plans that the page's commands print, in order."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        shutil.copytree(corpus_dir, "data")
        for words in commands():
            result = CliRunner().invoke(app, [*words, "--json"])
            assert result.exception is None, result.output
            found.append(json.loads(result.stdout))
    return found


def commands() -> list[list[str]]:
    lines = re.findall(r"^    movekd (cache plan .*)$", PAGE.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def table(first: str) -> list[list[str]]:
    """Return the cells of the table whose header begins with ``first``."""
    lines = iter(PAGE.splitlines())
    header = next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    rows = [header]
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def bytes_table(plans: list[Plan]) -> Iterator[list[str]]:
    yield ["teacher, codec, grid", "MB an image", *(f"{size}, TB" for size in SIZES)]
    totals: dict[str, list[float]] = {}
    for teacher in TEACHERS:
        ways = [part for part in plans[0]["teachers"] if part["teacher"] == teacher]
        for way in sorted(ways, key=lambda way: (-way["grid"], way["codec"])):
            what = {key: way[key] for key in ("teacher", "codec", "grid")}
            same = [p for plan in plans for p in plan["teachers"] if what.items() <= p.items()]
            cells = [way["row_bytes"] / 1e6, *(p["total_bytes"] / 1e12 for p in same)]
            if way["codec"] in SHOWN:
                yield [f"{teacher}, {way['codec']}, {way['grid']}x{way['grid']}", *figures(cells)]
            native = max(other["grid"] for other in ways)
            for grids in ("own grids",) * (way["grid"] == native) + ("24x24",) * (
                way["grid"] == 24
            ):
                sums = totals.setdefault(f"all, {way['codec']}, {grids}", [0.0] * len(cells))
                totals[f"all, {way['codec']}, {grids}"] = [
                    total + cell for total, cell in zip(sums, cells, strict=True)
                ]
    for name in sorted(totals, key=lambda name: ("own" not in name, name)):
        yield [name, *figures(totals[name])]


def hours_table(plans: list[Plan]) -> Iterator[list[str]]:
    yield ["teacher", "images/s", *SIZES]
    for teacher in TEACHERS:
        chosen = [p for plan in plans for p in plan["teachers"] if p["teacher"] == teacher]
        chosen = [part for part in chosen if part["is_spec"]]
        hours = [f"{part['needs']['forward_hours']:,.1f}" for part in chosen]
        yield [teacher, f"{chosen[0]['images_per_s']:g}", *hours]
    yield ["all", "", *(f"{plan['needs']['forward_hours']:,.1f}" for plan in plans)]


def needs_table(plans: list[Plan]) -> Iterator[list[str]]:
    headers = [*SIZES, "12,000,000, revised"]
    yield ["all teachers", *headers]
    yield ["build in hours, at most", *(f"{plan['asked_hours']:g}" for plan in plans)]
    for name, key in (
        ("writers", "writers"),
        ("readers", "readers"),
        ("Zarr shards, and seals", "zarr_shards"),
        ("files", "files"),
        ("PUT of the build", "put_requests"),
        ("GET of one training", "get_requests"),
    ):
        yield [name, *(f"{plan['needs'][key]:,}" for plan in plans)]
    yield ["read for a training, MB/s", *(f"{p['read_bytes_per_s'] / 1e6:,.0f}" for p in plans)]
    yield ["bytes, TB", *(f"{plan['total_bytes'] / 1e12:,.2f}" for plan in plans)]
    yield ["index and names, GB", *(f"{plan['table_bytes'] / 1e9:,.2f}" for plan in plans)]
    yield ["of that in a process, GB", *(f"{plan['held_bytes'] / 1e9:,.2f}" for plan in plans)]


def figures(values: list[float]) -> list[str]:
    return [f"{value:,.2f}" for value in values]


def test_the_commands_are_of_the_sizes(plans: list[Plan]) -> None:
    assert [f"{plan['num_images']:,}" for plan in plans] == [*SIZES, "12,000,000"]
    for plan in plans:
        assert tuple(dict.fromkeys(part["teacher"] for part in plan["teachers"])) == TEACHERS


def test_bytes_are_those_of_cache_plan(plans: list[Plan]) -> None:
    assert table("teacher, codec, grid") == list(bytes_table(plans[:4]))


def test_hours_are_those_of_cache_plan(plans: list[Plan]) -> None:
    assert table("teacher") == list(hours_table(plans[:4]))


def test_needs_are_those_of_cache_plan(plans: list[Plan]) -> None:
    assert table("all teachers") == list(needs_table(plans))


def test_the_array_has_the_parts_that_it_builds() -> None:
    sbatch = (DOCS / "examples/build-array.sbatch").read_text(encoding="utf-8")
    last = re.search(r"^#SBATCH --array=0-(\d+)", sbatch, re.MULTILINE)
    count = re.search(r'--partition "\$SLURM_ARRAY_TASK_ID/(\d+)"', sbatch)
    assert last
    assert count
    assert int(count[1]) == int(last[1]) + 1
    assert "examples/build-array.sbatch" in PAGE


def test_the_cluster_is_one_that_ray_takes() -> None:
    cluster = yaml.safe_load((DOCS / "examples/ray-cluster.yaml").read_text(encoding="utf-8"))
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = Path(ray.origin).parent / "autoscaler/ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf-8")))
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert sum(kind.get("max_workers", 0) for kind in types.values()) == cluster["max_workers"]
    assert "examples/ray-cluster.yaml" in PAGE


def test_the_corpus_of_the_page_is_any(corpus_dir: Path, plans: list[Plan]) -> None:
    """The tables do not depend on the images of the corpus."""
    assert plans[0]["num_images"] != len(open_corpus(corpus_dir))
