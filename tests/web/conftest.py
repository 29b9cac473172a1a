"""A real cache, a real run, `movekd view` over both, and Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page, sync_playwright

import demo
import scenes
from web_page import SCREENSHOTS, Served, serve, watched

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
DIGITS = Path(demo.__file__).parent


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, a ``cache`` of the demo's four teachers, and a run ``finetune``.

    The cache keeps all heads of clip's attention, which a new one does not unless it is asked to.

    A minute of training for pictures, so that what the docs show is a student that has learnt.
    """
    folder = tmp_path_factory.mktemp("world")
    num_pretrain, num_finetune = (2560, 1280) if SCREENSHOTS else (48, 16)
    source, data, cache = folder / "source", folder / "data", folder / "cache"
    scenes.write_corpus(
        source, num_pretrain=num_pretrain, num_finetune=num_finetune, num_val=1, num_test=1
    )
    stages = ("pretrain", "finetune")
    packed = [part for stage in stages for part in ("--llava-json", source / f"{stage}.json")]
    demo.movekd("shards", "pack", *packed, "--images", source / "images", "--output", data)
    specs = {name: DIGITS / "teachers" / f"{name}.yaml" for name in demo.TEACHERS}
    clip = yaml.safe_load(specs["clip"].read_text(encoding="utf-8"))
    clip |= {"weights": str(DIGITS / "weights/clip"), "cls_attention_heads": "all"}
    specs["clip"] = folder / "clip.yaml"
    specs["clip"].write_text(yaml.safe_dump(clip), encoding="utf-8")
    built = [part for spec in specs.values() for part in ("--teacher", spec)]
    demo.movekd("cache", "build", *built, "--shards", data, "--cache", cache, "--num-workers", 0)
    fixed = ["training.report_to=none", "training.logging_steps=1"]
    demo.train(DIGITS, folder, "pretrain", data, source, cache, 0, fixed)
    fixed.append(f"init_from={folder / 'pretrain'}")
    demo.train(DIGITS, folder, "finetune", data, source, cache, 0, fixed)
    return folder


@pytest.fixture(scope="session")
def served(world: Path) -> Iterator[Served]:
    """The page over all of ``world``."""
    with serve(world, "--shards", "data", "--run", "finetune") as served:
        yield served


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A browser that resolves no name, so that what asks for one fails."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.fail(f"none of {', '.join(CHROMIUM)} is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, served: Served) -> Iterator[Page]:
    """The page over ``world``, opened anew."""
    with watched(chromium, served) as page:
        yield page
