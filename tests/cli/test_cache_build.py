"""The options of `movekd cache build` that say who builds."""

import json

import pytest
import yaml

from command import invoke
from movekd.cli.cache import app
from movekd.errors import ConfigError


@pytest.fixture
def run(tmp_path, corpus_dir, tiny_specs):
    """A function that runs the command for one teacher; errors of ours come out."""
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(tiny_specs[0].model_dump(mode="json")))
    command = ["build", "--teacher", str(tmp_path / "clip.yaml"), "--shards", str(corpus_dir)]
    command += ["--cache", str(tmp_path / "cache"), "--batch-size", "5", "--json"]

    return lambda *more: invoke(app, *command, *more)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--engine", "rey"], r"--engine is 'rey'; expected one of local, ray.*'ray'"),
        (["--address", "auto"], r"--address goes with --engine ray"),
        (["--num-gpus-per-worker", "1"], r"--num-gpus-per-worker goes with --engine ray"),
        (["--num-decoders", "1"], r"--num-decoders goes with --engine ray"),
        (["--engine", "ray", "--partition", "0/2"], r"leave one of the two out"),
        (["--engine", "ray", "--address", "there"], r"--address is 'there'; expected auto, local"),
        (["--partition", "2/2"], r"the 2 parts are numbered 0 to 1"),
        (["--partition", "0/2", "--overwrite"], r"--overwrite deletes them all"),
    ],
)
def test_what_contradicts_itself_is_a_sentence(run, tmp_path, options, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(*options)
    assert not (tmp_path / "cache").exists()


def test_parts_are_built_one_by_one(run, tmp_path, small_shards, snapshot) -> None:
    options = ["--num-workers", "0", "--num-threads", "1", "--device", "cpu"]
    built = []
    for part in ("1/2", "0/2"):
        (summary,) = json.loads(run(*options, "--partition", part).stdout)
        built.append(summary["images_built"])
    assert sorted(built) == [8, 16]
    parts = snapshot(tmp_path / "cache")
    run(*options, "--replace")
    assert snapshot(tmp_path / "cache") == parts
