"""The options of `movekd cache build` that say who builds."""

import json

import pytest
import yaml

from command import invoke
from movekd.cli.cache import app
from movekd.distributed import torchrun_rank
from movekd.errors import ConfigError
from movekd.extract.torchrun import rank_resources


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


@pytest.fixture
def be(monkeypatch):
    """A function that makes this process a rank of torchrun."""

    def become(rank=1, world_size=8, local_world_size=8, max_restarts=0) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(max_restarts))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % local_world_size))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world_size))

    return become


@pytest.mark.parametrize(
    ("options", "place", "sentence"),
    [
        (["--partition", "0/8"], {}, r"--partition 0/8 divides .*torchrun .*its 8 processes"),
        (["--engine", "ray"], {}, r"--engine ray divides .*torchrun among its 8 processes"),
        (["--overwrite"], {"max_restarts": 1}, r"Give --overwrite on one node with --max-restarts"),
        (["--overwrite"], {"local_world_size": 4}, r"--overwrite deletes .*when a node joins"),
        (["--overwrite"], {"world_size": 1, "local_world_size": 1, "max_restarts": 3}, "--overw"),
    ],
)
def test_what_contradicts_torchrun_is_a_sentence(
    run, be, tmp_path, options, place, sentence
) -> None:
    be(**{"rank": 0} | place)
    with pytest.raises(ConfigError, match=sentence):
        run(*options)
    assert not (tmp_path / "cache").exists()


def test_a_rank_takes_its_own_gpu_and_its_share_of_the_cpus(be, monkeypatch) -> None:
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setattr("movekd.extract.torchrun.num_cpus", lambda: 16)
    be(rank=6, world_size=8, local_world_size=4)
    assert rank_resources("cuda", None, torchrun_rank()) == ("cuda:2", 3)
    assert rank_resources("cpu", 0, torchrun_rank()) == ("cpu", 0)
    assert taken == [2]
    with pytest.raises(ConfigError, match=r"--device is cuda:1, which all processes .*share"):
        rank_resources("cuda:1", None, torchrun_rank())
    be(rank=7, world_size=8, local_world_size=4)
    with pytest.raises(ConfigError, match=r"started 4 processes .*sees 3 GPUs.*--nproc-per-node 3"):
        rank_resources("cuda", None, torchrun_rank())


def test_one_process_of_torchrun_builds_as_without_it(run, be, tmp_path) -> None:
    be(rank=0, world_size=1, local_world_size=1)
    options = ["--num-workers", "0", "--device", "cpu", "--partition", "0/1"]
    (summary,) = json.loads(run(*options).stdout)
    assert summary["images_built"] == 24


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
