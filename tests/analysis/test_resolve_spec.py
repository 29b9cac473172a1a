"""Code of a user's own is run again from the YAML file that he gives, never from a cache."""

import sys
from pathlib import Path

import pytest
import yaml

from movekd.analysis.resolve_spec import spec_to_run
from movekd.analysis.verify_features import verify_features
from movekd.cache.reader import open_cache
from movekd.cache.spec import CacheSpec, load_spec
from movekd.cli.cache_verify import recompute_problems
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache

OPTIONS = BuildOptions(batch_size=4, num_workers=0)
MODULE = """
from pathlib import Path
from torch import nn

with Path(__file__).with_name("imported").open("a") as log:
    log.write("x")

def encoder(width):
    return nn.Conv2d(3, width, 4, stride=4)
"""


def forget() -> None:
    sys.modules.pop("mine_for_recompute", None)


@pytest.fixture
def built(tmp_path, corpus_dir, monkeypatch) -> tuple[Path, Path]:
    """A cache of one network of the user's own, on a grid that a flag chose, and its YAML file."""
    (tmp_path / "mine_for_recompute.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    forget()  # what another test has left
    content = {
        "name": "mine", "provider": "python", "factory": "mine_for_recompute:encoder",
        "weights": "factory", "model_args": {"width": 8}, "image_size": 16,
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "layer": "last",
        "calibration_images": 12,
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    spec = load_spec(str(tmp_path / "mine.yaml")).with_changes(grid=2)
    cache = tmp_path / "cache"
    for _ in build_cache(cache, open_corpus(corpus_dir), [spec], geometry="crop", options=OPTIONS):
        pass
    assert (tmp_path / "imported").exists()
    (tmp_path / "imported").unlink()
    forget()
    return cache, tmp_path / "mine.yaml"


def problems(cache, data, specs=()) -> list[str]:
    return list(verify_features(cache, open_corpus(data), 24, options=OPTIONS, specs=specs))


def test_a_cache_cannot_make_us_import(built, corpus_dir) -> None:
    cache, file = built
    (found,) = problems(cache, corpus_dir)
    assert f"'mine' in {cache} was not recomputed: it was built with the Python function" in found
    assert "mine_for_recompute:encoder" in found
    assert "--teacher FILE.yaml" in found
    assert not file.with_name("imported").exists()
    assert "mine_for_recompute" not in sys.modules


def test_the_user_s_own_yaml_is_run(built, corpus_dir) -> None:
    cache, file = built
    assert problems(cache, corpus_dir, [load_spec(str(file))]) == []
    assert file.with_name("imported").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("factory", "other:encoder"), ("model_args", {"width": 9}), ("seed", 4)]
)
def test_another_yaml_is_not_run(built, corpus_dir, key, value) -> None:
    cache, file = built
    other = load_spec(str(file)).with_changes(**{key: value})
    (found,) = problems(cache, corpus_dir, [other])
    assert f"the YAML file is not what it was built from: {key} is " in found
    assert f"in the cache, {value!r} in the file. Give the YAML file of the build" in found
    assert not file.with_name("imported").exists()


def test_the_command_line_takes_the_file(built, corpus_dir) -> None:
    cache, file = built

    def run(*teachers: str, weights: tuple[str, ...] = ()) -> list[str]:
        asked = (str(cache), 4, corpus_dir, teachers, weights, 0, "cpu", 4)
        return list(recompute_problems(*asked, lambda what, done, total: None))

    (refused,) = run("mine")
    assert "code is not run because a cache names it" in refused
    assert not file.with_name("imported").exists()
    assert run(str(file)) == []
    assert run(str(file), "mine") == []
    assert run(str(file), weights=("mine=factory",)) == []
    (missing,) = run(str(file), weights=("none.pth",))
    assert "none.pth does not exist" in missing


def test_a_file_of_a_teacher_that_is_not_there_is_refused(
    cache_dir, corpus_dir, tiny_specs
) -> None:
    other = tiny_specs[0].with_changes(name="clap")
    with pytest.raises(ConfigError, match=r"no teacher 'clap'. Did you mean 'clip'\?"):
        problems(cache_dir, corpus_dir, [other])


def test_a_file_is_taken_for_teachers_of_the_libraries_too(cache_dir, tiny_specs) -> None:
    """Then its weights need not be given again; random ones stay random."""
    store = open_cache(cache_dir)["clip"]
    assert spec_to_run(store, None, None) == store.spec
    assert spec_to_run(store, tiny_specs[0].with_changes(weights="/a"), None).weights == "random"
    with pytest.raises(ConfigError, match=r"layer is -2 in the cache, -1 in the file"):
        spec_to_run(store, tiny_specs[0].with_changes(layer=-1), None)


def test_where_weights_come_from(built) -> None:
    cache, file = built
    store, given = open_cache(cache)["mine"], load_spec(str(file))
    assert isinstance(given, CacheSpec)
    assert spec_to_run(store, given, None).weights == "factory"
    assert spec_to_run(store, given, "/a/b.pth").weights == "/a/b.pth"
    with pytest.raises(ConfigError, match="weights are random only in the file"):
        spec_to_run(store, given.with_changes(weights="random"), None)
