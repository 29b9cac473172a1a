"""Make a smaller cache out of a larger one, without the teachers: `movekd cache recode`.

    rows of the source -> decode -> encode with the other codec -> Zarr shards of the output

Input: a complete cache and the name of a codec. Output: another cache of the same rows, with the
same index, channel statistics, skipped rows, [CLS] and attention. Its specs name the codec and the
calibration that the rows were decoded from, so no build mixes them with rows of the teacher itself.
``extract.encoding_error`` says what the seals can say about the errors.

A recoding that is interrupted and run again leaves the same bytes as one that is not. The unit of
work is one Zarr shard of the output, as in a build.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from movekd.cache import layout
from movekd.cache.catalog import Catalog
from movekd.cache.codecs import codec
from movekd.cache.codecs.lowrank import LOWRANK
from movekd.cache.contents import read_calibration
from movekd.cache.reader import FeatureCache, TeacherCache, open_cache
from movekd.cache.schema import Calibration
from movekd.cache.spec import CacheSpec, RecodedFrom
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage, open_storage
from movekd.cache.verify import TeacherStatus, shard_problems, teacher_status
from movekd.cache.writer import TeacherWriter, create_group, resize_group, stats_checksum
from movekd.errors import CacheError, ConfigError
from movekd.extract.background_worker import BackgroundWorker
from movekd.extract.calibrate import delete_teacher
from movekd.extract.encoding_error import source_error
from movekd.extract.locks import BuildLocks, sealing
from movekd.extract.options import Progress, Tell, print_error
from movekd.extract.recode_catalog import copy_catalog, require_other_place
from movekd.extract.sealed_teacher import delete_leftovers, open_sealed, skipped_table
from movekd.extract.shard_buffer import ShardBuffer, ShardTask, mean_attention, shard_tasks
from movekd.teachers import TeacherOutput

BATCH_BYTES = {"cpu": 4 * 2**20}
"""Decoded tokens that are encoded together, by kind of device; they decide the last bits.

A CPU holds few rows in its caches: with 64 MiB it is less than half as fast.
"""
OTHER_BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RecodeSummary:
    """Result of a recoding for one teacher.

    Attributes:
        status: what the output now holds of the teacher. Its errors are upper bounds.
        source_row_bytes: bytes per row in the source, before compression.
        row_bytes: the same in the output.
        rows_recoded: rows that this run wrote.
        seconds: how long that took.
    """

    status: TeacherStatus
    source_row_bytes: int
    row_bytes: int
    rows_recoded: int
    seconds: float


@dataclass(frozen=True)
class _Recoding:
    """One teacher: where its rows come from, and what they become."""

    source: TeacherCache
    spec: CacheSpec
    calibration: Calibration
    stats: ChannelStats


@dataclass(frozen=True)
class _Rows:
    """Some rows of the source; in ``unreadable`` those without features."""

    images: Sequence[int]
    unreadable: Mapping[int, str]


def recode_cache(
    source: str | Path | Storage,
    output: str | Path | Storage,
    to: str,
    *,
    teachers: Sequence[str] = (),
    cls_attention_heads: str | None = None,
    max_error: float | None = None,
    max_energy_error: float | None = None,
    is_verifying: bool = False,
    device: str = "cpu",
    tell: Tell = print_error,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[RecodeSummary]:
    """Write some teachers of a cache to another cache in another codec; yield one summary each.

    Every byte of the source is compared with its seals before it is decoded. Zarr shards that the
    output has already are not made again.

    Args:
        source: the cache to read. It does not change.
        output: the cache to make or to continue. It may have other teachers of the same images.
        to: name of the codec.
        teachers: which teachers. Default: all.
        cls_attention_heads: ``mean`` stores the mean over heads. Default: what the source has.
        max_error: the run stops if the bound of a token's error exceeds this. Default: never.
        max_energy_error: the same for the energy error of a Zarr shard; the last one of fewer than
            32 images only gives a warning.
        is_verifying: compare every byte of what the output has first, and make again what differs.
            Default: only existence and size.
        device: where tokens are decoded and encoded. The last bits may depend on it.
        tell: called with sentences that a user should know at once.
        progress: called after each batch.

    Raises:
        CacheError: the source is not complete or damaged; the output is another cache, or holds a
            teacher of another origin; or another build of the teacher is running.
        ConfigError: an unknown codec, teacher or value, or a codec that makes nothing smaller.
    """
    opened, into = open_cache(source, verify="checksum"), open_storage(output)
    require_other_place(opened.storage, into)
    names = list(dict.fromkeys(teachers or opened.teachers))
    if not names:
        raise CacheError(f"{opened.url} holds no teacher; build one first.")
    limits = {"max_error": max_error, "max_energy_error": max_energy_error}
    recodings = [_plan(opened, name, to, cls_attention_heads, limits, tell) for name in names]
    for recoding in recodings:
        _require_same_origin(into, recoding)
    catalog = copy_catalog(opened, into)
    summaries = []
    with BuildLocks(into, names) as locks:
        for recoding in recodings:
            name, started = recoding.spec.name, time.perf_counter()
            with locks.settling():
                delete_leftovers(into, locks, name)
                _settle(into, recoding, catalog.num_rows)
                store, wrong = open_sealed(into, catalog, name, tell)
            if is_verifying:
                wrong |= _damaged(store, catalog, wrong, tell)
            tasks = shard_tasks(catalog, store, sorted({*store.missing_shards, *wrong}))
            _recode_shards(recoding, store, tasks, opened, torch.device(device), progress)
            with locks.settling():
                delete_leftovers(into, locks, name)
                locks.remove_dead(name)
                store = TeacherWriter(into, name, catalog.num_rows)
                store.write_skipped(skipped_table(catalog, store.skipped))
            summaries.append(
                RecodeSummary(
                    status=teacher_status(store, catalog),
                    source_row_bytes=recoding.source.layout.row_bytes,
                    row_bytes=store.layout.row_bytes,
                    rows_recoded=sum(len(task.rows) for task in tasks),
                    seconds=time.perf_counter() - started,
                )
            )
    yield from summaries


def _plan(
    opened: FeatureCache,
    name: str,
    to: str,
    heads: str | None,
    limits: Mapping[str, float | None],
    tell: Tell,
) -> _Recoding:
    """Return what a teacher becomes, or refuse what cannot be or makes nothing smaller."""
    source = opened[name]
    spec, old = source.spec, source.calibration
    if source.missing_shards:
        raise CacheError(
            f"teacher '{name}' in {opened.url} lacks {len(source.missing_shards)} of "
            f"{source.layout.num_shards(source.num_rows)} Zarr shards; a recoded cache cannot be "
            "finished with the teacher. Finish it with its `movekd cache build` first, or leave it "
            "out with --teacher."
        )
    chosen, stored_as = codec(to), source.codec_name
    if to == LOWRANK:
        raise ConfigError(
            f"--to {LOWRANK} leaves the rank to a calibration, and recoding runs none; name a "
            f"rank, such as {LOWRANK}32."
        )
    if to == stored_as:
        raise ConfigError(
            f"teacher '{name}' in {opened.url} is stored as {to} already; name another codec with "
            "--to, or leave this teacher out with --teacher."
        )
    if heads == "all" != spec.stored_heads and spec.cls_attention:
        raise ConfigError(
            f"teacher '{name}' in {opened.url} has the mean over heads of its attention, from "
            "which the heads cannot be had again; leave --cls-attention-heads out."
        )
    for key, limit in limits.items():
        found = getattr(spec, key)
        if found is not None and limit is None:
            tell(
                f"{name}: {key} {found} of its spec was a limit for codec {stored_as} and is not "
                f"compared; give --{key.replace('_', '-')} to set one for {to}."
            )
    origin = RecodedFrom(codec=stored_as, calibration=old.hash)
    changes = {"codec": to, "recoded_from": (*spec.recoded_from, origin), **limits}
    if heads is not None and spec.cls_attention:
        changes["cls_attention_heads"] = heads
    spec = spec.with_changes(**changes)
    stats = source.stats.for_codec(chosen)
    num_heads = 1 if old.num_heads is not None and spec.stored_heads == "mean" else old.num_heads
    calibration = old.model_copy(
        update={
            "spec_fingerprint": spec.fingerprint,
            "num_heads": num_heads,
            "channel_stats_xxh3_128": stats_checksum(stats),
            "codec": None,  # of the source: the spec of the output names its codec
        }
    )
    row_bytes = calibration.layout(spec).row_bytes
    if row_bytes >= source.layout.row_bytes:
        raise ConfigError(
            f"a row of '{name}' takes {source.layout.row_bytes:,} bytes as "
            f"{stored_as} and {row_bytes:,} as {to}; recoding loses accuracy and saves "
            "nothing. Name a smaller codec with --to."
        )
    return _Recoding(source, spec, calibration, stats)


def _require_same_origin(into: Storage, recoding: _Recoding) -> None:
    """Refuse a teacher in the output that was not recoded from this source with this codec."""
    name, spec = recoding.spec.name, recoding.spec
    found = read_calibration(into, name)
    if found is not None and found != recoding.calibration:
        raise CacheError(
            f"{into.url} holds '{name}' already, and not as {spec.codec} recoded from this "
            f"{spec.recoded_from[-1].codec}: another codec, another source, or built with the "
            "teacher. Give another --output, or delete "
            f"{layout.group_name(name)} and {layout.seals_name(name)} there."
        )


def _settle(into: Storage, recoding: _Recoding, num_rows: int) -> None:
    """Make sure that the output has the group, its sealed calibration and arrays of this length."""
    name = recoding.spec.name
    with sealing(into, layout.calibration_name(name)):
        if read_calibration(into, name) is None:
            delete_teacher(into, name)  # what an interrupted creation left
            create_group(into, recoding.spec, recoding.calibration, recoding.stats, num_rows)
    resize_group(into, recoding.spec, recoding.calibration, num_rows)


def _damaged(store: TeacherWriter, catalog: Catalog, known: set[int], tell: Tell) -> set[int]:
    """Return the sealed Zarr shards of the output that differ from their seals, read in full."""
    sealed = [shard for shard in store.sealed_shards if shard not in known]
    problems = list(shard_problems(store, catalog, sealed))
    for _, problem in problems:
        tell(f"{store.teacher}: {problem}")
    return {shard for shard, _ in problems}


def _recode_shards(
    recoding: _Recoding,
    store: TeacherWriter,
    tasks: Sequence[ShardTask],
    opened: FeatureCache,
    device: torch.device,
    progress: Progress,
) -> None:
    source, spec = recoding.source, recoding.spec
    stats, size = store.stats.to(device), _rows_per_batch(source, device)
    done, total = 0, sum(len(task.rows) for task in tasks)
    with BackgroundWorker("movekd-write", 1) as writer:
        for task in tasks:
            first = task.shard * store.layout.rows_per_shard
            end = first + store.layout.rows_per_shard
            shards = range(first // source.layout.rows_per_shard, _div_up(end, source))
            sealed = [seal for _, seal in source.read_seals([*shards])]
            error = source_error(sealed, first, end)
            buffer = ShardBuffer(store, task, opened.catalog, spec, error)
            for start in range(0, len(task.rows), size):
                rows = task.rows[start : start + size]
                skipped = {
                    at: source.skipped[row]
                    for at, row in enumerate(rows.tolist())
                    if row in source.skipped
                }
                batch = _Rows(rows.tolist(), skipped)
                if len(skipped) == len(rows):
                    buffer.skip(batch)
                else:
                    output = mean_attention(_read(source, rows, device), spec)
                    buffer.add(output, batch, stats)
                done += len(rows)
                progress(f"{spec.name}: recode", done, total)
            writer.submit(buffer.write, store.storage)


def _div_up(end: int, source: TeacherCache) -> int:
    return min(-(-end // source.layout.rows_per_shard), source.layout.num_shards(source.num_rows))


def _rows_per_batch(source: TeacherCache, device: torch.device) -> int:
    row_bytes = 4 * source.layout.num_tokens * source.layout.width
    num_rows = BATCH_BYTES.get(device.type, OTHER_BATCH_BYTES) // row_bytes
    return max(1, min(num_rows, layout.MAX_SHARD_ROWS))


def _read(source: TeacherCache, rows: npt.NDArray[np.int64], device: torch.device) -> TeacherOutput:
    """Return what the source holds of some rows, decoded; [CLS] and attention are float16 values.

    Their float32 values become the same float16 values again.
    """
    targets = source.read(rows).to(device)
    return TeacherOutput(targets.tokens_BND, targets.cls_BD, targets.cls_attention_BHN)
