"""Promises about what is loaded: light commands stay light, training loads no teacher code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import scenes
from movekd.cache.spec import load_spec
from movekd.cli.main import app
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache

PIPELINE = Path(scenes.__file__).parent
HEAVY = ("torch", "transformers", "numpy", "timm", "open_clip", "zarr", "pyarrow", "PIL")


def loaded_after(script, *arguments):
    """Return the names of all modules that a fresh interpreter has loaded after ``script``."""
    program = f"{script}\nimport json, sys\nprint('LOADED' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rsplit("LOADED", 1)[1])


def heavy(modules, packages=HEAVY):
    return [m for m in modules if any(m == p or m.startswith(f"{p}.") for p in packages)]


RUN = (
    "import sys\nfrom movekd.cli.main import app\n"
    "try:\n    app(sys.argv[1:])\nexcept SystemExit as done:\n    assert not done.code"
)


def commands(command, words=()):
    """Yield the words of every command and group, read off the app."""
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


COMMANDS = list(commands(typer.main.get_command(app)))


def test_help_loads_nothing_heavy():
    """One process prints the help of all commands; only a failure is looked into one by one."""
    script = (
        "import sys\nfrom movekd.cli.main import app\n"
        "for words in sys.argv[1:]:\n"
        "    try:\n        app([*words.split(), '--help'])\n"
        "    except SystemExit as done:\n        assert not done.code"
    )
    assert len(COMMANDS) > 15
    every = [" ".join(words) for words in COMMANDS]
    if heavy(loaded_after(script, *every)):
        assert [words for words in every if heavy(loaded_after(script, words))] == []


def test_importing_movekd_loads_nothing_heavy():
    assert heavy(loaded_after("import movekd")) == []


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_looking_at_a_cache_loads_no_torch(cache_dir, command):
    modules = loaded_after(RUN, "cache", command, "--cache", cache_dir)
    assert heavy(modules, ("torch", "transformers")) == []


def test_packing_and_listing_shards_load_no_torch(tmp_path, crops):
    images = tmp_path / "images"
    images.mkdir()
    crops[0].save(images / "a.png")
    packed = loaded_after(RUN, "shards", "pack", "--images", images, "--output", tmp_path / "data")
    assert (tmp_path / "data" / "index.parquet").exists()
    listed = loaded_after(RUN, "shards", "ls", tmp_path / "data")
    assert heavy([*packed, *listed], ("torch", "transformers", "zarr")) == []


def test_training_loads_no_teacher_code(tmp_path):
    scenes.write_corpus(tmp_path, num_pretrain=4, num_finetune=1, num_val=1, num_test=1)
    pack_llava([tmp_path / "pretrain.json"], tmp_path / "images", tmp_path / "data", num_workers=1)
    spec = load_spec(str(PIPELINE / "teachers/clip.yaml"))
    corpus = open_corpus(tmp_path / "data")
    options = BuildOptions(num_workers=0)
    list(build_cache(tmp_path / "cache", corpus, [spec], geometry="crop", options=options))
    script = (
        "import sys\nimport torch\ntorch.set_num_threads(1)\n"
        "from movekd.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)"
    )
    overrides = [
        f"data.shards={tmp_path / 'data'}",
        "distill.teachers=[clip]",
        "training.per_device_train_batch_size=4",
        "training.max_steps=1",
        "training.use_cpu=true",
    ]
    modules = loaded_after(
        script,
        *["train", "--config", PIPELINE / "pretrain.yaml", "--cache", tmp_path / "cache"],
        *["--output", tmp_path / "run"],
        *[word for override in overrides for word in ("--set", override)],
    )
    assert (tmp_path / "run/model/mole_encoder.safetensors").exists()
    assert "movekd.train.run" in modules
    assert heavy(modules, ("movekd.teachers", "movekd.extract", "timm", "open_clip")) == []
