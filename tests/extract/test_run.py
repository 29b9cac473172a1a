"""Legend: N tokens, D channels."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from builds import build
from kills import kill_at
from movekd.cache import layout
from movekd.cache.reader import open_cache
from movekd.cache.storage import open_storage
from movekd.cache.verify import verify
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError
from movekd.extract.image_loader import image_transform
from movekd.extract.locks import build_lock, part_lock
from movekd.extract.options import BuildOptions
from movekd.teachers import load_teacher


def test_what_is_stored_is_what_the_teacher_says(cache_dir, corpus_dir, tiny_specs) -> None:
    corpus, cache = open_corpus(corpus_dir), open_cache(cache_dir)

    for spec in tiny_specs:
        teacher, store = load_teacher(spec), cache[spec.name]
        transform = image_transform(spec, "crop")
        pixels = torch.stack([torch.from_numpy(transform(corpus.read_image(i))) for i in range(24)])
        output, stored = teacher.forward(pixels), store.read(range(24))
        if spec.grid == "native":
            exact = store.stats.standardise(output.tokens_BND)
            error = (stored.standardised_BND - exact).norm(dim=-1) / exact.norm(dim=-1)
            assert error.max().item() <= store.seals[0].error.max * 1.01
            assert torch.allclose(stored.cls_BD, output.cls_BD, atol=5e-3)
            mean_B1N = output.cls_attention_BHN.mean(1, keepdim=True)
            torch.testing.assert_close(stored.cls_attention_BHN, mean_B1N, rtol=1e-3, atol=1e-7)
        assert store.calibration.weights_sha256 == teacher.weights_sha256


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_and_run_again_equals_undisturbed(
    tmp_path, corpus_dir, tiny_specs, snapshot, undisturbed, error
) -> None:
    generator = random.Random(error.__name__)
    calls = 0
    limit = 0

    def interrupt(what, done, total):
        nonlocal calls
        calls += 1
        if calls == limit:
            raise error

    build(tmp_path / "counted", corpus_dir, tiny_specs, progress=interrupt)
    limits = generator.sample(range(1, calls + 1), 6)
    for number, limit in enumerate(limits):
        calls = 0
        with pytest.raises(error):
            build(tmp_path / f"{number}", corpus_dir, tiny_specs, progress=interrupt)
        assert snapshot(tmp_path / f"{number}") != undisturbed
        limit = 0
        build(tmp_path / f"{number}", corpus_dir, tiny_specs)
        assert snapshot(tmp_path / f"{number}") == undisturbed


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_file_and_run_again_equals_undisturbed(
    tmp_path, grown, tiny_specs, small_shards, snapshot, stride
) -> None:
    """A first build and an append, killed with -9 as they touch one file after the other."""
    small, large = grown
    specs = [tiny_specs[1]]
    build(tmp_path / "first", small, specs)
    first = snapshot(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    build(tmp_path / "second", large, specs)
    second = snapshot(tmp_path / "second")
    for data, start, expected in ((small, None, first), (large, "first", second)):
        event, killed = 1, True
        while killed:
            out = tmp_path / "built"
            shutil.rmtree(out, ignore_errors=True)
            if start is not None:
                shutil.copytree(tmp_path / start, out)
            killed = kill_at(event, lambda out=out, data=data: build(out, data, specs), "built")
            build(out, data, specs)
            assert snapshot(out) == expected, event
            event += stride
        assert event > 24
        assert list(verify(out)) == []


def test_the_command_killed_and_run_again_ends_whole(tmp_path, corpus_dir, tiny_specs) -> None:
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(tiny_specs[0].model_dump(mode="json")))
    out = tmp_path / "cache"
    command = [sys.executable, "-m", "movekd", "cache", "build", "--teacher"]
    command += [str(tmp_path / "clip.yaml"), "--shards", str(corpus_dir), "--cache", str(out)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (out / part_lock("clip")).exists() and process.poll() is None:
            pass
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    build(out, corpus_dir, tiny_specs[:1])
    assert list(verify(out)) == []
    assert not list(out.rglob(".*"))


def test_a_complete_cache_is_left_alone(
    tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(cache_dir, out)
    seen = []
    summaries = build(out, corpus_dir, tiny_specs, progress=lambda *call: seen.append(call))
    assert [summary.images_built for summary in summaries] == [0, 0]
    assert seen == []
    assert snapshot(out) == snapshot(cache_dir)


def test_another_teacher_touches_nothing_of_the_first(
    tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot
) -> None:
    out = tmp_path / "cache"
    for spec in reversed(tiny_specs):
        before = snapshot(out) if out.exists() else {}
        build(out, corpus_dir, [spec])
        assert before.items() <= snapshot(out).items()
    assert snapshot(out) == snapshot(cache_dir)


def test_appended_images_touch_no_sealed_shard(
    tmp_path, grown, tiny_specs, small_shards, snapshot
) -> None:
    small, large = grown
    out = tmp_path / "cache"
    build(out, small, tiny_specs)
    before = snapshot(out)
    old = open_cache(out)
    summaries = build(out, large, tiny_specs)
    assert [summary.images_built for summary in summaries] == [3, 3]
    after = snapshot(out)
    changed = {name for name in before if before[name] != after[name]}
    allowed = ("cache.json", "index.parquet", "names.parquet", "metadata.json", "zarr.json")
    assert all(name.endswith(allowed) for name in changed)
    assert list(verify(out)) == []
    new = open_cache(out)
    names = [f"{number:02d}.png" for number in range(10)]
    for teacher in old:
        assert torch.equal(
            old[teacher].read(old.rows(names)).tokens_BND,
            new[teacher].read(new.rows(names)).tokens_BND,
        )


def test_replace_builds_anew_and_leaves_the_others(
    tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(cache_dir, out)
    build(out, corpus_dir, [tiny_specs[0].with_changes(seed=7)], replace=True)
    before, after = snapshot(cache_dir), snapshot(out)
    assert {name for name in before if before[name] != after[name]} >= {"clip.zarr/tokens/c/0/0/0"}
    assert all(name.startswith("clip.") for name in before if before[name] != after[name])
    build(out, corpus_dir, tiny_specs[:1], replace=True)
    assert snapshot(out) == before


def test_other_weights_are_refused(tmp_path, corpus_dir, tiny_specs) -> None:

    args = tiny_specs[0].model_args
    paths = []
    for seed in (0, 1):
        module = load_teacher(tiny_specs[0].with_changes(seed=seed)).module
        paths.append(tmp_path / f"{seed}.safetensors")
        state = {name: t.clone() for name, t in module.state_dict().items()}
        save_file(state, paths[-1])
    first, second = (
        tiny_specs[0].with_changes(weights=str(path), model_args=args) for path in paths
    )
    out = tmp_path / "cache"
    build(out, corpus_dir, [first])
    (out / layout.seal_name("clip", 0)).unlink()
    with pytest.raises(CacheError, match=r"the weights of 'clip' have SHA-256 .*--overwrite"):
        build(out, corpus_dir, [second])
    build(out, corpus_dir, [first])
    assert list(verify(out)) == []


def test_worker_processes_change_nothing(tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot):
    options = BuildOptions(batch_size=5, num_workers=2)
    build(tmp_path / "cache", corpus_dir, tiny_specs, options=options)
    assert snapshot(tmp_path / "cache") == snapshot(cache_dir)


def test_sealed_teachers_without_cache_json_take_no_other_corpus(
    tmp_path, grown, corpus_dir, tiny_specs, snapshot
) -> None:
    """Rows would silently become those of other images."""
    small, large = grown
    out = tmp_path / "cache"
    build(out, small, tiny_specs)
    (out / "cache.json").unlink()
    before = snapshot(out)
    for data in (small, large, corpus_dir):
        with pytest.raises(CacheError, match=r"no cache\.json.*sealed features of clip, conv"):
            build(out, data, tiny_specs)
        assert snapshot(out) == before


def test_a_full_disk_during_an_append_leaves_the_old_cache(
    tmp_path, grown, tiny_specs, snapshot
) -> None:
    small, large = grown
    out = tmp_path / "cache"
    build(out, small, tiny_specs[:1])
    before = snapshot(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, (out / "index.parquet").stat().st_size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(CacheError, match=r"cannot be written: File too large"):
                build(out, large, tiny_specs[:1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert snapshot(out) == before
        open_cache(out)["clip"].read([0])


def test_damaged_metadata_of_an_array_is_mended_by_the_next_build(
    tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(cache_dir, out)
    path = out / "clip.zarr" / "tokens" / "zarr.json"
    for damage in (path.read_bytes()[:-3], None):
        path.write_bytes(damage) if damage is not None else path.unlink()
        assert any("tokens/zarr.json" in p and "build` again" in p for p in verify(out))
        build(out, corpus_dir, tiny_specs)
        assert snapshot(out) == snapshot(cache_dir)


def test_a_running_build_locks_its_teacher_alone(tmp_path, corpus_dir, tiny_specs) -> None:
    out = tmp_path / "cache"
    with build_lock(open_storage(out), part_lock("clip")):
        with pytest.raises(CacheError, match=rf"another build .*pid {os.getpid()} on "):
            build(out, corpus_dir, tiny_specs[:1])
        build(out, corpus_dir, tiny_specs[1:])
    build(out, corpus_dir, tiny_specs)


@pytest.mark.parametrize("name", ["skipped.json", "skipped.parquet"])
def test_a_damaged_list_of_skipped_images_is_mended_by_the_next_build(
    tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot, name
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(cache_dir, out)
    whole = snapshot(out)
    (out / "clip.seals" / name).write_bytes(b"?")
    build(out, corpus_dir, tiny_specs)
    assert snapshot(out) == whole
