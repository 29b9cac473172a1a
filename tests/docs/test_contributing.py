"""The map of CONTRIBUTING.md leads to files that exist, and its table has every room."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAP = PAGE.split("open Y\n")[1].split("\n## ")[0]
PLACEHOLDER = re.compile(r"\bx\b|_x\b|NAME|<\w+>")


def test_every_path_of_the_map_exists() -> None:
    named = re.findall(r"`((?:movekd|tests|docs|cache_specs|pipelines|benchmarks)/[^`]*)`", MAP)
    assert len(named) > 30
    for path in named:
        place = ROOT / path
        assert (place.parent if PLACEHOLDER.search(place.name) else place).exists(), path


def test_every_room_is_in_the_table() -> None:
    table = PAGE.split("## Rooms\n")[1].split("\n## ")[0]
    rooms = {room for row in re.findall(r"^\| (`.*?) \|", table, re.M) for room in row.split(", ")}
    names = {path.stem for path in (ROOT / "movekd").iterdir() if path.suffix in ("", ".py")}
    missing = {f"`{name}`" for name in names if not name.startswith("_")} - rooms
    assert not missing
