"""`movekd cache recode` as a user types it."""

import json
import shutil

import pytest

from builds import build
from command import invoke
from movekd.cache.codecs import codec_names
from movekd.cache.contents import open_contents
from movekd.cache.verify import status
from movekd.cli.cache import app
from movekd.errors import ConfigError


def run(*words):
    return invoke(app, *words)


@pytest.fixture(scope="module")
def source(tmp_path_factory, corpus_dir, tiny_specs):
    out = tmp_path_factory.mktemp("float16") / "cache"
    build(out, corpus_dir, [tiny_specs[0].with_changes(codec="float16")])
    return out


def test_a_smaller_cache_is_made_listed_and_verified(tmp_path, source) -> None:
    out = tmp_path / "small"
    command = ("recode", "--cache", source, "--to", "int8", "--output", out, "--device", "cpu")
    shown = run(*command)
    assert f"{out}: recoded to int8; errors are upper bounds" in shown.stdout
    assert max(len(line) for line in shown.stdout.splitlines()[1:]) <= 120
    (again,) = json.loads(run(*command, "--json").stdout)  # nothing is left to do
    assert again["rows_recoded"] == 0
    assert again["row_bytes"] < 0.6 * again["source_row_bytes"]
    assert again["status"]["recoded_from"] == ["float16"]

    listed = run("ls", "--cache", out).stdout
    assert "clip: recoded from float16; errors are upper bounds\n" in listed
    widths = [max(map(len, run("ls", c).stdout.splitlines()[1:])) for c in (source, out)]
    assert widths[1] <= 120
    assert "recoded" not in run("ls", source).stdout
    (teacher,) = json.loads(run("ls", out, "--json").stdout)["teachers"]
    assert teacher == again["status"]
    assert "no problems" in run("verify", out).stdout

    old_form = ("recode", source, "--to", "int8", "--output", tmp_path / "other", "--json")
    assert json.loads(run(*old_form).stdout)[0]["rows_recoded"] == 24


def test_the_features_are_recomputed_against_the_teacher(tmp_path, source, corpus_dir) -> None:
    out = tmp_path / "small"
    run("recode", source, "--to", "int8", "--output", out)
    asked = ("verify", out, "--recompute", 4, "--shards", corpus_dir, "--device", "cpu")
    assert "no problems" in run(*asked).stdout
    path = out / "clip.zarr" / "tokens" / "c" / "0" / "0" / "0"
    path.write_bytes(bytes(100) + path.read_bytes()[100:])
    found = run(*asked)
    assert found.exit_code == 1
    assert "is damaged" in found.stdout


def test_wrong_values_are_refused_by_name(tmp_path, source) -> None:
    out = tmp_path / "small"
    for more, sentence in (
        (("--to", "int9"), r"no codec 'int9'\. Did you mean 'int8'.* Known: .*int4"),
        (("--to", "lowrank0"), r"no codec 'lowrank0': the rank must be from 1 to"),
        (("--to", "int8", "--cls-attention-heads", "first"), "--cls-attention-heads is 'first'"),
        (("--to", "int8", "--max-error", 0), r"--max-error is 0\.0; expected a number above 0"),
        (("--to", "int8", "--teacher", "clop"), "holds no teacher 'clop'"),
        (("--to", "float16"), "stored as float16 already"),
    ):
        with pytest.raises(Exception, match=sentence) as caught:
            run("recode", source, "--output", out, *more)
        assert type(caught.value).__module__ == "movekd.errors"
    with pytest.raises(ConfigError, match="two caches"):
        run("recode", source, "--cache", out, "--to", "int8", "--output", out)
    shutil.rmtree(out, ignore_errors=True)
    assert run("recode", source, "--output", out).exit_code == 2  # --to is missing


def test_a_rank_that_no_list_names_is_taken(tmp_path, source) -> None:
    assert "lowrank3" not in codec_names()
    run("recode", source, "--to", "lowrank3", "--output", tmp_path / "out")
    assert {teacher.codec for teacher in status(open_contents(tmp_path / "out"))} == {"lowrank3"}
