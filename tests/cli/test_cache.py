import contextlib
import json
import resource
import shutil
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from command import invoke
from corpus_files import make_unreadable
from movekd.cli.cache import app
from movekd.cli.main import main
from movekd.cli.options import read_specs
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, ConfigError, CorpusError, MovekdError


def run(*words):
    return invoke(app, *words)


@pytest.fixture
def teachers(tmp_path, tiny_specs) -> list[str]:
    """`--teacher` for each of the tiny specs, written to YAML files."""
    arguments = []
    for spec in tiny_specs:
        path = tmp_path / f"{spec.name}.yaml"
        path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        arguments += ["--teacher", str(path)]
    return arguments


def test_build_ls_verify_end_to_end(tmp_path, teachers, corpus_dir, cache_dir, snapshot) -> None:
    cache = tmp_path / "cache"
    command = ("build", *teachers, "--shards", corpus_dir, "--cache", cache)
    command += ("--batch-size", 5, "--num-workers", 0, "--device", "cpu")
    built = json.loads(run(*command, "--json").stdout)
    assert [summary["images_built"] for summary in built] == [24, 24]
    assert snapshot(cache) == snapshot(cache_dir)
    again = run(*command)
    assert again.exit_code == 0
    assert "clip" in again.stdout

    listed = json.loads(run("ls", cache, "--json").stdout)
    assert listed["geometry"] == "crop"
    assert [teacher["teacher"] for teacher in listed["teachers"]] == ["clip", "conv"]
    assert listed["teachers"][0] == built[0]["status"]
    assert "24 images, geometry crop" in run("ls", cache).stdout

    verified = json.loads(run("verify", cache, "--json").stdout)
    assert verified["problems"] == []
    assert verified["bytes"] > 0
    assert "no problems" in run("verify", cache).stdout


def test_verify_exits_with_one_and_names_the_file(tmp_path, cache_dir) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    path = cache / "conv.zarr" / "tokens" / "c" / "0" / "0" / "0"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    result = run("verify", cache)
    assert result.exit_code == 1
    assert f"{path} is damaged" in result.stdout
    with pytest.raises(CacheError, match="holds no cache"):  # exit code 2
        run("verify", tmp_path / "none")


def test_skipped_images_are_listed_and_exit_with_one(tmp_path, teachers, corpus_dir) -> None:
    data = tmp_path / "data"
    shutil.copytree(corpus_dir, data)
    key = make_unreadable(data, 2)
    command = ("build", *teachers, "--shards", data, "--cache", tmp_path / "cache")
    command += ("--num-workers", 0)
    result = run(*command)
    assert result.exit_code == 1
    assert f"clip: skipped {key}: " in result.stderr
    assert "more than 0.10% of the images were skipped" in result.stderr
    assert run(*command, "--max-skipped-fraction", 0.5).exit_code == 0


def test_images_that_became_others_stop_every_command(
    tmp_path, teachers, changed_corpus, cache_dir
) -> None:
    """They are no unreadable images, which a build may skip."""
    data, position = changed_corpus
    key = open_corpus(data).key(position)
    match = rf"^image {key} of .* bytes at .* of shard-00000\.tar have SHA-256 .*Restore it"
    commands = [
        ("build", *teachers, "--shards", data, "--cache", tmp_path / "cache", "--num-workers", n)
        for n in (0, 1)
    ]
    show = ("show", "--cache", cache_dir, "--key", key, "--shards", data)
    for command in (*commands, (*show, "--output", tmp_path / "sheets")):
        with pytest.raises(CorpusError, match=match):
            run(*command)
    assert not list(tmp_path.rglob("0*.json"))  # no seal


def test_flags_change_the_specs(tmp_path, teachers, corpus_dir) -> None:
    cache = tmp_path / "cache"
    command = ("build", *teachers[:2], "--shards", corpus_dir, "--cache", cache)
    command += ("--num-workers", 0, "--resize-mode", "pad", "--codec", "float16", "--grid", 2)
    (summary,) = json.loads(run(*command, "--calibration-images", 4, "--json").stdout)
    assert (summary["status"]["codec"], summary["status"]["grid"]) == ("float16", 2)
    with pytest.raises(CacheError, match="calibration_images is 4 in the cache, 12 asked for"):
        run(*command)
    replaced = run(*command, "--overwrite")
    assert replaced.exit_code == 0
    assert "deleting" in replaced.stderr


def test_replace_deletes_nothing_before_everything_is_checked(
    tmp_path, teachers, corpus_dir, cache_dir, snapshot
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    command = ("build", *teachers[:2], "--cache", cache, "--num-workers", 0, "--overwrite")
    for wrong in (
        ("--shards", corpus_dir, "--weights", tmp_path / "none.safetensors"),
        ("--shards", tmp_path / "none"),
        ("--shards", corpus_dir, "--resize-mode", "pad"),
    ):
        result = CliRunner().invoke(app, [str(word) for word in (*command, *wrong)])
        assert isinstance(result.exception, MovekdError)
        assert "deleting" not in result.stderr
        assert snapshot(cache) == snapshot(cache_dir)


def test_the_revised_recipe_pools_to_the_students_grid(
    tmp_path, teachers, corpus_dir, monkeypatch
) -> None:
    monkeypatch.setattr("movekd.cli.options.STUDENT_GRID", 3)
    command = ("build", *teachers[:2], "--shards", corpus_dir, "--cache", tmp_path / "cache")
    command += ("--num-workers", 0, "--recipe", "revised", "--json")
    (summary,) = json.loads(run(*command).stdout)
    assert summary["status"]["grid"] == 3
    command = (*command, "--overwrite", "--grid", "native")
    (summary,) = json.loads(run(*command).stdout)
    assert summary["status"]["grid"] == 4


def test_plan(tmp_path, teachers, corpus_dir, monkeypatch) -> None:
    monkeypatch.setattr("movekd.analysis.plan._MIN_SECONDS", 0.0)
    command = ("plan", *teachers, "--shards", corpus_dir, "--num-images", 1000)
    planned = json.loads(run(*command, "--json").stdout)
    chosen = [plan for plan in planned["teachers"] if plan["is_spec"]]
    assert planned["total_bytes"] == sum(1000 * plan["row_bytes"] for plan in chosen)
    assert "1,000 images" in run(*command).stdout
    too_many = run("plan", *teachers, "--shards", corpus_dir, "--num-images", 10**15)
    assert too_many.exit_code == 1
    assert "more than is free" in too_many.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resize-mode", "croop"], r"--resize-mode is 'croop'.*Did you mean 'crop'\?"),
        (["--dtype", "int3"], "--dtype is 'int3'; expected auto"),
        (["--grid", "²"], "--grid is '²'; expected native, student or a number"),
        (["--device", "banana"], "--device banana cannot be used: "),
        (["--device", "meta"], "--device meta cannot be used: "),
        (["--grid", "wide"], "--grid is 'wide'; expected native, student or a number"),
        (["--codec", "int9"], "codec: "),
        (["--recipe", "own"], "--recipe is 'own'; expected official or revised"),
        (["--compressor", "lz"], "compressor: "),
        (["--weights", "w"], "--weights fits one --teacher"),
        (["--teacher", "clup"], r"no teacher 'clup'.*Did you mean 'clip'\?"),
    ],
)
def test_wrong_flags_are_sentences(tmp_path, teachers, corpus_dir, arguments, message) -> None:
    command = ("build", *teachers, "--shards", corpus_dir, "--cache", tmp_path / "cache")
    with pytest.raises(ConfigError, match=message):
        run(*command, *arguments)
    assert not (tmp_path / "cache").exists()


NUMBERS = {
    "build": "batch-size num-workers num-threads calibration-images grid max-skipped-fraction "
    "num-gpus-per-worker num-decoders",
    "plan": "batch-size num-images student-grid grid assume-write assume-read build-hours "
    "train-rate epochs",
    "fidelity": "num-images batch-size num-workers student-grid student-width calibration-images",
    "verify": "recompute seed batch-size",
}


@pytest.mark.parametrize(
    ("command", "option"), [(name, option) for name in NUMBERS for option in NUMBERS[name].split()]
)
def test_a_number_out_of_range_is_refused(teachers, corpus_dir, tmp_path, command, option) -> None:
    needed = (
        ["--cache", tmp_path] if command == "verify" else [*teachers[:2], "--shards", corpus_dir]
    )
    for number in ("nan", "-1", "9" * 40, "9" * 5_000):
        sentence = ""
        with contextlib.suppress(ConfigError):
            result = run(command, *needed, f"--{option}", number)
            assert result.exit_code == 2
            sentence = result.stderr
        assert not sentence or option in sentence


def test_a_teacher_given_twice_is_refused(teachers, corpus_dir) -> None:
    with pytest.raises(ConfigError, match="a teacher is given twice: clip, clip, conv"):
        run("build", *teachers, *teachers[:2], "--shards", corpus_dir)


def test_errors_are_one_sentence_with_exit_code_two_and_no_traceback(tmp_path) -> None:
    command = [sys.executable, "-m", "movekd", "cache", "ls", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"movekd: {tmp_path} holds no cache")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "movekd: interrupted. What is sealed or saved stays; run the"),
        (PermissionError(13, "Permission denied", "cache"), 2, "movekd: cache: Permission denied."),
    ],
)
def test_interruptions_and_the_systems_errors_are_sentences(
    cache_dir, monkeypatch, capsys, raised, code, sentence
) -> None:
    def status(*_: object) -> None:
        raise raised

    monkeypatch.setattr("movekd.cache.verify.teacher_status", status)
    monkeypatch.setattr(sys, "argv", ["movekd", "cache", "ls", str(cache_dir)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(sentence)


def test_a_full_disk_is_a_sentence_of_the_build(tmp_path, teachers, corpus_dir) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(CacheError, match="cannot be written: File too large"):
            run("build", *teachers, "--shards", corpus_dir, "--cache", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_names_with_brackets_are_printed_as_they_are(tmp_path, cache_dir) -> None:
    shutil.copytree(cache_dir, tmp_path / "br[/b]")
    assert "br[/b]: 24 images" in run("ls", tmp_path / "br[/b]").stdout


def test_recompute_is_refused_before_anything_is_read(cache_dir) -> None:
    for words in (["--recompute", "2"], ["--teacher", "clip"]):
        with pytest.raises(ConfigError, match=r"--recompute"):
            run("verify", cache_dir, *words)


def test_anyres_caches_are_stretched_unless_told_otherwise(
    tmp_path, teachers, view_corpora
) -> None:
    data, cache = view_corpora[0], tmp_path / "cache"
    command = ("build", *teachers[:2], "--shards", data, "--num-workers", 0, "--device", "cpu")
    (summary,) = json.loads(run(*command, "--cache", cache, "--tiles", "anyres", "--json").stdout)
    assert (summary["images_built"], summary["status"]["rows"]) == (27, 27)
    listed = json.loads(run("ls", cache, "--json").stdout)
    found = {key: listed[key] for key in ("geometry", "views", "images", "rows")}
    assert found == {"geometry": "stretch", "views": "anyres", "images": 7, "rows": 27}
    shown = run("ls", cache).stdout
    assert "7 images, geometry stretch, views anyres: 27 rows" in shown
    with pytest.raises(CacheError, match=r"views 'anyres', the build asks for 'base'.*--tiles any"):
        run(*command, "--cache", cache)
    with pytest.raises(CacheError, match=r"geometry 'stretch', the build asks for 'pad'"):
        run(*command, "--cache", cache, "--tiles", "anyres", "--resize-mode", "pad")
    run(*command, "--cache", tmp_path / "pad", "--tiles", "anyres", "--resize-mode", "pad")
    assert json.loads(run("ls", tmp_path / "pad", "--json").stdout)["geometry"] == "pad"
    with pytest.raises(ConfigError, match=r"--tiles is 'anyers'.*Did you mean 'anyres'\?"):
        run(*command, "--cache", cache, "--tiles", "anyers")


def test_a_plan_of_an_anyres_cache_counts_its_rows(tmp_path, teachers, view_corpora) -> None:
    command = ("plan", *teachers[:2], "--shards", view_corpora[0], "--cache", tmp_path)
    command += ("--tiles", "anyres", "--assume-rate", 10, "--no-measure-disk")
    assert "7 images, 27 rows" in run(*command).stdout.replace("\n", " ")
    planned = json.loads(run(*command, "--num-images", 14, "--json").stdout)
    assert planned["num_rows"] == 54


def test_random_weights_fit_several_teachers() -> None:
    specs = read_specs(["clip", "dinov2"], weights="random")
    assert [spec.weights for spec in specs] == ["random", "random"]
