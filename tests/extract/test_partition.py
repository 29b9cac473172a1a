"""Parts of a build, alone and several at a time on one cache."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest

from builds import OPTIONS, build
from movekd.cache.reader import open_cache
from movekd.cache.storage import open_storage
from movekd.cache.verify import verify
from movekd.errors import CacheError, ConfigError
from movekd.extract import calibrate as calibration
from movekd.extract import executor as executors
from movekd.extract import shard_buffer as shards
from movekd.extract.executor import LocalExecutor
from movekd.extract.locks import BuildLocks, build_lock
from movekd.extract.partition import WHOLE, Partition, parse_partition


@pytest.mark.parametrize("text", ["3", "a/b", "1/0", "-1/4", "1/4/2", ""])
def test_what_is_no_part_is_a_sentence(text) -> None:
    with pytest.raises(ConfigError, match=r"--partition is '.*0/1"):
        parse_partition(text)


def test_a_part_out_of_range_says_how_they_are_numbered() -> None:
    with pytest.raises(ConfigError, match=r"'16/16'; the 16 parts are numbered 0 to 15.*0-15"):
        parse_partition("16/16")
    assert parse_partition(" 15/16") == Partition(15, 16)


@pytest.mark.parametrize("rows_per_shard", [1, 64, 1024])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_every_zarr_shard_is_of_one_part(rows_per_shard, count) -> None:
    """And parts of one corpus have the same images of every teacher, so that they decode once."""
    parts = [Partition(index, count) for index in range(count)]
    for shard in range(100):
        owners = [part for part in parts if part.owns(shard, rows_per_shard)]
        assert len(owners) == 1
        assert owners[0].owns(shard * rows_per_shard // 1024, 1024)


def test_parts_one_after_the_other_equal_a_whole_build(
    tmp_path, corpus_dir, tiny_specs, undisturbed, snapshot
) -> None:
    built = []
    for index in (2, 0, 1, 3):
        part = Partition(index, 4)  # of three blocks, so that the last part has nothing to do
        summaries = build(tmp_path / "cache", corpus_dir, tiny_specs, partition=part)
        built.append([summary.images_built for summary in summaries])
        again = build(tmp_path / "cache", corpus_dir, tiny_specs, partition=part)
        assert [summary.images_built for summary in again] == [0, 0]
    assert built == [[8, 8], [8, 8], [8, 8], [0, 0]]
    assert snapshot(tmp_path / "cache") == undisturbed


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_parts_at_the_same_time_calibrate_once_and_equal_a_whole_build(
    tmp_path, corpus_dir, tiny_specs, undisturbed, monkeypatch, place
) -> None:
    calibrated, written = [], []
    original, write = executors.calibrate, shards.write_shard

    def counted(*arguments):
        calibrated.append(arguments[1].name)
        return original(*arguments)

    def counted_write(storage, spec, sealed, shard, *arguments, **more):
        written.append((spec.name, shard))
        write(storage, spec, sealed, shard, *arguments, **more)

    monkeypatch.setattr(executors, "calibrate", counted)
    monkeypatch.setattr(shards, "write_shard", counted_write)
    monkeypatch.setattr("movekd.extract.locks.RENEW_S", 0.05)
    out = tmp_path / "cache" if place == "folder" else f"memory://{tmp_path.name}/cache"
    failed = []

    def part(index: int) -> None:
        specs = tiny_specs[:: 1 if index else -1]  # parts need not name teachers in one order
        try:
            build(out, corpus_dir, specs, partition=Partition(index, 3))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=part, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(calibrated) == ["clip", "conv"]
    assert sorted(written) == [(name, shard) for name in ("clip", "conv") for shard in range(3)]
    storage = open_storage(out)
    assert {name: storage.read(name) for name in storage.sizes()} == undisturbed
    assert list(verify(out)) == []


def test_replace_of_a_part_is_refused(tmp_path, corpus_dir, tiny_specs) -> None:
    with pytest.raises(ConfigError, match=r"--partition 0/2 .*--overwrite deletes them all"):
        build(tmp_path, corpus_dir, tiny_specs, partition=Partition(0, 2), replace=True)
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys
from movekd.extract.locks import BuildLocks
from movekd.extract.partition import parse_partition
from movekd.cache.storage import open_storage
with BuildLocks(open_storage(sys.argv[1]), ["clip"], parse_partition(sys.argv[2])) as locks:
    with locks.settling():
        pass
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def running_part(tmp_path):
    """Another process that has settled part 1/3 and is building it."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "cache"), "1/3"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_beside_a_part_whole_builds_other_numbers_and_itself_are_refused(
    tmp_path, corpus_dir, tiny_specs, running_part, undisturbed, snapshot
) -> None:
    out = tmp_path / "cache"
    found = rf"another build .*\(part 1/3, pid {running_part.pid} on .*wait for it"
    for more in (
        {},
        {"replace": True},
        {"partition": Partition(1, 3)},
        {"partition": Partition(1, 2)},
        {"partition": Partition(0, 1)},
    ):
        with pytest.raises(CacheError, match=found):
            build(out, corpus_dir, tiny_specs, **more)
    build(out, corpus_dir, tiny_specs, partition=Partition(0, 3))
    build(out, corpus_dir, tiny_specs, partition=Partition(2, 3))
    assert open_cache(out)["clip"].missing_shards == [1]
    running_part.kill()
    running_part.wait()
    build(out, corpus_dir, tiny_specs, partition=Partition(1, 2))  # the dead count for nothing
    assert snapshot(out) == undisturbed


@pytest.mark.parametrize("other", [WHOLE, Partition(0, 2)])
def test_of_builds_that_arrive_together_and_exclude_each_other_one_is_refused(
    tmp_path, other
) -> None:
    storage = open_storage(tmp_path)
    for _ in range(20):
        start, refused, said = threading.Barrier(2), threading.Event(), []

        def arrive(part: Partition, start=start, refused=refused, said=said) -> None:
            start.wait()
            try:
                with BuildLocks(storage, ["clip", "conv"], part):
                    said.append("held")
                    refused.wait(60)
            except CacheError:
                said.append("refused")
                refused.set()

        threads = [threading.Thread(target=arrive, args=(part,)) for part in (WHOLE, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(said) == ["held", "refused"]
    assert not list(tmp_path.rglob("*.lock"))


def test_another_build_is_refused_while_the_first_calibrates(
    tmp_path, corpus_dir, tiny_specs
) -> None:
    refused = []

    def progress(what, done, total) -> None:
        if "calibrate" in what and not refused:
            for part in (None, Partition(1, 2)):
                with pytest.raises(CacheError, match=rf"another build .*pid {os.getpid()} on "):
                    build(tmp_path / "cache", corpus_dir, tiny_specs, partition=part)
                refused.append(part)

    build(tmp_path / "cache", corpus_dir, tiny_specs[:1], progress=progress)
    assert refused == [None, Partition(1, 2)]
    assert list(verify(tmp_path / "cache")) == []


def test_a_part_is_refused_beside_a_whole_build(tmp_path, corpus_dir, tiny_specs) -> None:
    storage = open_storage(tmp_path)
    with (
        BuildLocks(storage, ["clip"]),
        pytest.raises(CacheError, match=rf"\(pid {os.getpid()} on"),
    ):
        build(tmp_path, corpus_dir, tiny_specs[:1], partition=Partition(0, 2))


def test_leftovers_are_deleted_by_a_part_that_is_alone(
    tmp_path, corpus_dir, tiny_specs, small_shards, running_part
) -> None:
    """Beside another part they can be what that one is writing."""
    out = tmp_path / "cache"
    leftover = out / ".clip.zarr.tokens.c.1.0.0.123-abc.tmp"
    leftover.write_bytes(b"half")
    build(out, corpus_dir, tiny_specs[:1], partition=Partition(0, 3))
    assert leftover.exists()
    running_part.kill()
    running_part.wait()
    build(out, corpus_dir, tiny_specs[:1], partition=Partition(0, 3))
    assert not leftover.exists()
    assert not list(out.rglob(".*"))


def test_who_outlives_its_build_writes_no_zarr_shard_of_the_next(
    tmp_path, corpus_dir, tiny_specs, small_shards, monkeypatch, snapshot
) -> None:
    """A worker whose driver was killed, while another build replaces the teacher."""
    out = tmp_path / "cache"
    other = tiny_specs[0].with_changes(seed=7)
    original, order = shards.read_calibration, []

    def replaced_meanwhile(storage, teacher):
        if not order:
            order.append("replace")
            monkeypatch.setattr(calibration, "wait_for_writers", lambda *_: order.append("wait"))
            build(out, corpus_dir, [other], replace=True, partition=None)
        return original(storage, teacher)

    @contextlib.contextmanager
    def unlocked(*_):
        yield

    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_calibration", replaced_meanwhile)
        patch.setattr(shards, "sealing", unlocked)
        patch.setattr("movekd.extract.run.BuildLocks", _NoLocks)
        with pytest.raises(CacheError, match=r"'clip' in .* was replaced by another build"):
            build(out, corpus_dir, tiny_specs[:1])
    assert order[:2] == ["replace", "wait"]
    build(tmp_path / "alone", corpus_dir, [other])
    assert snapshot(out) == snapshot(tmp_path / "alone")


class _NoLocks:
    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def settling(self):
        return contextlib.nullcontext()

    def is_only_part(self, teacher):
        return False

    def remove_dead(self, teacher):
        pass


def test_a_zarr_shard_that_another_writes_is_waited_for_and_left_alone(
    tmp_path, corpus_dir, tiny_specs, small_shards, monkeypatch, undisturbed, snapshot
) -> None:
    """Two workers build one unit, because the cluster had given one of them up."""
    out, storage = tmp_path / "cache", open_storage(tmp_path / "cache")
    build(out, corpus_dir, tiny_specs)
    (out / "clip.seals/00001.json").rename(tmp_path / "seal")
    written, write = [], shards.write_shard
    monkeypatch.setattr(
        shards, "write_shard", lambda *given, **more: written.append(1) or write(*given, **more)
    )

    class Slow(LocalExecutor):
        def build(self, context, jobs):
            self.lock = build_lock(storage, "clip.seals/.00001.lock")
            self.lock.__enter__()
            worker = threading.Thread(target=self.finish)
            worker.start()
            return super().build(context, jobs)

        def finish(self):
            (tmp_path / "seal").rename(out / "clip.seals/00001.json")
            self.lock.__exit__(None, None, None)

    build(out, corpus_dir, tiny_specs, executor=Slow(), options=OPTIONS)
    assert written == []
    assert snapshot(out) == undisturbed


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_seal_that_appeared_meanwhile_is_not_written_over(
    tmp_path, corpus_dir, tiny_specs, small_shards, monkeypatch, place
) -> None:
    """As when the holder of a lock was paused for so long that it counted as dead."""
    out = tmp_path / "cache" if place == "folder" else f"memory://{tmp_path.name}/cache"
    storage, write = open_storage(out), shards.write_shard

    def overtaken(*given, **more):
        storage.write("clip.seals/00000.json", [b"other"])
        write(*given, **more)

    monkeypatch.setattr(shards, "write_shard", overtaken)
    with pytest.raises(CacheError, match=r"00000\.json was made by another build .*cache verify"):
        build(out, corpus_dir, tiny_specs[:1])
    assert storage.read("clip.seals/00000.json") == b"other"
