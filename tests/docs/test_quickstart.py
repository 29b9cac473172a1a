"""The five commands of docs/quickstart.md run as they are written."""

import json
import os
import re
from pathlib import Path

import zarr

from forked import follow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")


def test_its_five_commands_do_what_it_says(tmp_path: Path) -> None:
    commands = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(commands) == 5
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")  # a checkout, but for what it writes
    printed = [follow(command, tmp_path, os.environ) for command in commands]

    assert "640 images" in printed[1]
    cache = tmp_path / "quickstart/cache"
    for teacher, width in (("clip", 96), ("eva", 96)):
        tokens = zarr.open_group(cache / f"{teacher}.zarr", mode="r")["tokens"]
        assert tokens.shape[0] == 640
        assert tokens.shape[-1] == width
    log = json.loads((tmp_path / "quickstart/run/log.json").read_text(encoding="utf-8"))
    losses = [entry["loss_kd"] for entry in log if "loss_kd" in entry]
    assert losses[-1] < losses[0]
    assert "exact match" in printed[4]
