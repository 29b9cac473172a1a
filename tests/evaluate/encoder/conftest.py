"""Labelled images, a run, and a cache that holds most of the images."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from builds import build
from labelled_folder import write_labelled_folder
from movekd.cache.spec import CacheSpec
from movekd.corpus.pack import pack_folder
from movekd.evaluate.encoder.labelled_images import LabelledImages, read_labelled_images
from small_run import write_run


class Cached(NamedTuple):
    """A cache of two tiny teachers, and the corpus that it was built from."""

    cache: Path
    shards: Path


@pytest.fixture(scope="package")
def quiet() -> Callable[[str, int, int], None]:
    return lambda what, done, total: None


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_folder(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="package")
def images(folder: Path, quiet: Callable[[str, int, int], None]) -> LabelledImages:
    return read_labelled_images(folder, quiet)


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="package")
def cached(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, tiny_specs: list[CacheSpec]
) -> Cached:
    """The corpus has other names than the folder and lacks five of its train images."""
    base = tmp_path_factory.mktemp("cached")
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        if number % 20 != 7:
            shutil.copy(path, base / f"{number}.png")
    shards = tmp_path_factory.mktemp("packed") / "data"
    pack_folder(base, shards, num_workers=1)
    specs = [spec.with_changes(codec="float16", grid="native") for spec in tiny_specs]
    cache = tmp_path_factory.mktemp("built") / "cache"
    build(cache, shards, specs)
    return Cached(cache, shards)
