"""The executor for a cluster and its workers, without a cluster: a worker in this process."""

import contextlib
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from builds import build
from movekd.cache import layout
from movekd.cache.reader import open_cache
from movekd.errors import CacheError, ConfigError
from movekd.extract.ray import worker
from movekd.extract.ray.executor import ITEMS_PER_WORKER, RayExecutor, work_items
from movekd.extract.ray.worker import Worker
from movekd.teachers import load_teacher


class Here:
    """A pool of one worker, in this process."""

    def __init__(self, _, assignment):
        self.worker = Worker(assignment)

    def work_through(self, items):
        self.worker.loaded().checked()
        return [(item, self.worker.build(item).checked()) for item in items]


@pytest.fixture
def executor(monkeypatch) -> RayExecutor:
    monkeypatch.setattr("movekd.extract.ray.executor.WorkerPool", Here)
    monkeypatch.setattr(worker, "_here", lambda: "node here")
    return RayExecutor(
        SimpleNamespace(
            errors_as_messages=contextlib.nullcontext,
            require_alike=lambda environment: None,
            num_workers=lambda: 2,
            num_decoders=0,
        )
    )


@pytest.fixture
def begun(tmp_path, corpus_dir, tiny_specs, small_shards):
    """A cache of one teacher that lacks a Zarr shard."""
    build(tmp_path / "cache", corpus_dir, tiny_specs[:1])
    (tmp_path / "cache" / layout.seal_name("clip", 1)).unlink()
    return tmp_path / "cache"


def test_an_error_of_a_teacher_arrives_as_its_sentence(
    executor, begun, corpus_dir, tiny_specs
) -> None:
    worst = json.loads((begun / "clip.seals/00000.json").read_text())["error"]["max"]
    strict = tiny_specs[0].with_changes(max_error=worst * 0.5)
    sentence = r"teacher 'clip', rows .*; the spec allows max_error .* or raise max_error\."
    with pytest.raises(CacheError) as caught:
        build(begun, corpus_dir, [strict], executor=executor)
    assert re.fullmatch(sentence, str(caught.value))
    assert "in add" in caught.value.__notes__[0]  # where, for --debug
    assert open_cache(begun)["clip"].missing_shards == [1]


def test_an_error_that_is_none_of_ours_says_where(
    executor, begun, corpus_dir, tiny_specs, monkeypatch
) -> None:
    def fail(*_):
        raise RuntimeError("device-side assert\nand more")

    monkeypatch.setattr("movekd.extract.executor.run_teachers", fail)
    said = r"^a worker on node here failed: RuntimeError: device-side assert What is sealed is safe"
    with pytest.raises(CacheError, match=said):
        build(begun, corpus_dir, tiny_specs[:1], executor=executor)


def test_other_weights_on_a_node_are_refused_with_its_name(
    executor, tmp_path, corpus_dir, tiny_specs, small_shards
) -> None:
    paths = []
    for seed in (0, 1):
        module = load_teacher(tiny_specs[0].with_changes(seed=seed)).module
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file({name: t.clone() for name, t in module.state_dict().items()}, paths[-1])
    spec, out = tiny_specs[0].with_changes(weights=str(paths[0])), tmp_path / "cache"
    build(out, corpus_dir, [spec])
    seal = out / layout.seal_name("clip", 0)
    sealed = seal.read_bytes()
    seal.unlink()
    build(out, corpus_dir, [spec], executor=executor)
    assert seal.read_bytes() == sealed
    seal.unlink()
    paths[1].replace(paths[0])
    with pytest.raises(CacheError, match=r"^node here: the weights of 'clip' have SHA-256"):
        build(out, corpus_dir, [spec], executor=executor)


def test_a_cache_that_only_this_process_sees_is_refused(executor, corpus_dir, tiny_specs) -> None:
    with pytest.raises(ConfigError, match=r"of one process; workers cannot see it"):
        build("memory://ray-executor/cache", corpus_dir, tiny_specs, executor=executor)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.tuples(st.sampled_from([16, 128, 1024]), st.sets(st.integers(0, 200))),
    ),
    st.integers(1, 20),
)
def test_work_items_hold_every_zarr_shard_once(missing, num_workers) -> None:
    """And an image is in one item, whoever wants it, so that it is decoded once."""
    jobs = [
        SimpleNamespace(
            spec=SimpleNamespace(name=name),
            store=SimpleNamespace(layout=SimpleNamespace(rows_per_shard=rows)),
            shards=sorted(shards),
        )
        for name, (rows, shards) in missing.items()
    ]
    items = work_items(jobs, num_workers)
    found = [(name, shard) for item in items for name, given in item.items() for shard in given]
    assert sorted(found) == sorted(
        (n, shard) for n, (_, shards) in missing.items() for shard in shards
    )
    blocks = [
        {shard * missing[name][0] // 1024 for name, shards in item.items() for shard in shards}
        for item in items
    ]
    assert all(len(block) == 1 for block in blocks)
    ranges = [
        {
            row
            for name, shards in item.items()
            for shard in shards
            for row in range(shard * missing[name][0], (shard + 1) * missing[name][0], 16)
        }
        for item in items
    ]
    assert sum(map(len, ranges)) == len(set().union(*ranges))
    if len(items) < ITEMS_PER_WORKER * num_workers:  # no larger than they must be for that
        largest = max((rows for rows, shards in missing.values() if shards), default=1)
        assert len(items) == len(
            {s * r // largest for r, shards in missing.values() for s in shards}
        )
