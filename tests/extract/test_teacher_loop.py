"""Several teachers together, and what runs behind them."""

import contextlib
import dataclasses
import shutil

import pytest
import torch

from builds import OPTIONS, build
from movekd.cache import layout
from movekd.cache.reader import open_cache
from movekd.cache.verify import verify
from movekd.errors import CacheError, WeightsError
from movekd.extract import image_loader
from movekd.extract.shard_buffer import ShardBuffer
from movekd.extract.teacher_loop import SideStream, TeacherBuild


@pytest.mark.parametrize("concurrent", [False, True])
def test_teachers_built_together_are_those_built_alone_from_images_decoded_once(
    tmp_path, corpus_dir, tiny_specs, small_shards, snapshot, monkeypatch, concurrent
) -> None:
    """In turns of several Zarr shards, of which one teacher has half as many rows."""
    for spec in tiny_specs:
        build(tmp_path / "alone", corpus_dir, [spec])
    for name in ("clip.seals/00001.json", "conv.seals/00002.json"):
        shutil.copytree(tmp_path / "alone", tmp_path / name[:4], dirs_exist_ok=True)
        (tmp_path / name[:4] / name).unlink()
    decoded, moves = [], []
    original, moved = image_loader.decode_image, TeacherBuild.move_to
    monkeypatch.setattr(
        image_loader, "decode_image", lambda data: decoded.append(1) or original(data)
    )
    monkeypatch.setattr(
        TeacherBuild, "move_to", lambda self, device: moves.append(device) or moved(self, device)
    )
    options = dataclasses.replace(OPTIONS, concurrent=concurrent)
    build(tmp_path / "together", corpus_dir, tiny_specs, options=options)
    assert snapshot(tmp_path / "together") == snapshot(tmp_path / "alone")
    assert len(decoded) == 12 + 12 + 24  # two calibrations, then all of them once
    assert bool(moves) is not concurrent
    decoded.clear()
    for name in ("clip", "conv"):  # one of three Zarr shards of eight rows is missing
        build(tmp_path / name, corpus_dir, tiny_specs, options=options)
        assert snapshot(tmp_path / name) == snapshot(tmp_path / "alone")
    assert len(decoded) == 16


def test_a_batch_that_fails_behind_the_teacher_is_never_sealed(
    tmp_path, corpus_dir, tiny_specs, monkeypatch, small_shards
) -> None:
    """Its neighbours of the same Zarr shard may be on their way by then."""
    original, calls = ShardBuffer.add, []

    def fail_once(self, output, batch, stats):
        calls.append(self)
        if len(calls) == 3:
            raise CacheError("a feature is not a number")
        original(self, output, batch, stats)

    monkeypatch.setattr(ShardBuffer, "add", fail_once)
    with pytest.raises(CacheError, match="not a number"):
        build(tmp_path / "cache", corpus_dir, tiny_specs[:1])
    failed = calls[2]._task.shard
    seals = [p.name for p in (tmp_path / "cache" / "clip.seals").glob("0*.json")]
    assert seals == [f"{shard:05d}.json" for shard in range(failed)]


def test_weights_out_of_reach_stop_a_build_before_any_teacher_runs(
    tmp_path, corpus_dir, tiny_specs
) -> None:
    lost = tiny_specs[1].with_changes(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(WeightsError, match="does not exist"):
        build(tmp_path / "cache", corpus_dir, [tiny_specs[0], lost])
    assert not list((tmp_path / "cache" / "clip.seals").glob("0*.json"))
    build(tmp_path / "cache", corpus_dir, tiny_specs)
    assert list(verify(tmp_path / "cache")) == []


def test_replace_deletes_nothing_unless_all_teachers_can_be_built_anew(
    tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(cache_dir, out)
    whole = snapshot(out)
    lost = tiny_specs[1].with_changes(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(WeightsError, match="does not exist"):
        build(out, corpus_dir, [tiny_specs[0], lost], replace=True)
    assert snapshot(out) == whole


def test_a_teacher_without_company_stays_on_the_device(
    tmp_path, corpus_dir, tiny_specs, small_shards, monkeypatch
) -> None:
    build(tmp_path / "cache", corpus_dir, tiny_specs[:1])
    moves, moved = [], TeacherBuild.move_to
    monkeypatch.setattr(
        TeacherBuild, "move_to", lambda self, device: moves.append(device) or moved(self, device)
    )
    build(tmp_path / "cache", corpus_dir, tiny_specs)
    assert len(moves) == 2  # aside while others may come, and back


@pytest.mark.slow
def test_many_compiled_teachers_are_all_compiled(
    tmp_path, corpus_dir, tiny_specs, snapshot
) -> None:
    """All of one class: torch lets them share one limit of recompilations unless told otherwise."""
    specs = [tiny_specs[0].with_changes(name=f"clip{n}", seed=n) for n in range(6)]
    options = dataclasses.replace(OPTIONS, compile=True)
    build(tmp_path / "together", corpus_dir, specs, options=options)
    torch.compiler.reset()
    build(tmp_path / "alone", corpus_dir, specs[-1:], options=options)
    together, alone = snapshot(tmp_path / "together"), snapshot(tmp_path / "alone")
    for name, content in alone.items():
        if name.startswith("clip5"):
            assert together[name] == content, name


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same_and_is_sealed_as_compiled(
    tmp_path, corpus_dir, tiny_specs, snapshot
) -> None:
    options = dataclasses.replace(OPTIONS, compile=True)
    out = tmp_path / "compiled"
    build(out, corpus_dir, tiny_specs, options=options)
    build(tmp_path / "plain", corpus_dir, tiny_specs)
    compiled, plain = open_cache(out), open_cache(tmp_path / "plain")
    for teacher in plain:
        assert compiled[teacher].calibration.is_compiled
        assert not plain[teacher].calibration.is_compiled
        found, expected = compiled[teacher].read(range(24)), plain[teacher].read(range(24))
        torch.testing.assert_close(found.tokens_BND, expected.tokens_BND, rtol=0.02, atol=0.05)
        if expected.cls_attention_BHN is not None:
            torch.testing.assert_close(
                found.cls_attention_BHN, expected.cls_attention_BHN, rtol=1e-2, atol=1e-4
            )
    whole = snapshot(out)
    (out / layout.seal_name("clip", 0)).unlink()
    build(out, corpus_dir, tiny_specs)  # goes on as it was begun
    assert snapshot(out) == whole


def test_features_are_encoded_on_a_stream_of_their_own_after_their_forward_pass(
    tmp_path, corpus_dir, tiny_specs, monkeypatch, snapshot, cache_dir
) -> None:
    """The order of calls, on a stand-in: no GPU is needed for it, none has confirmed it."""
    said: list[str] = []

    class Stream:
        def __init__(self, device) -> None:
            self.marks = 0

        def record_event(self) -> int:
            self.marks += 1
            said.append(f"mark {self.marks}")
            return self.marks

        def wait_event(self, mark) -> None:
            said.append(f"wait {mark}")

        def synchronize(self) -> None:
            said.append("done")

    main = Stream(None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    original = SideStream.__init__
    monkeypatch.setattr(
        SideStream, "__init__", lambda self, device: original(self, torch.device("cuda"))
    )
    build(tmp_path / "cache", corpus_dir, tiny_specs[:1])
    assert [word for word in said if word.startswith("mark")] == [f"mark {n}" for n in range(1, 6)]
    behind = [word for word in said if not word.startswith("mark")]
    assert behind == [word for n in range(1, 6) for word in (f"wait {n}", "done")]
    assert all(said.index(f"mark {n}") < said.index(f"wait {n}") for n in range(1, 6))
    whole = snapshot(cache_dir)
    for name, content in snapshot(tmp_path / "cache").items():
        assert whole[name] == content or not name.startswith("clip")
