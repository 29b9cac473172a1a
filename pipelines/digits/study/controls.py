"""Make the caches of the control arms: features of other images, and labels in place of features.

Each is derived from the cache of an arm that it is compared with, and has its teachers, arrays and
sizes, so nothing but the values differs.

Dimensions: B scenes, N tokens, D width, C classes or pixels, K rows of the cache.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import pretrain
import scenes
from movekd.cache import open_cache
from movekd.cache.codecs import codec
from movekd.cache.grid import resize_tokens
from movekd.cache.layout import CACHE_JSON, INDEX, NAMES, skipped_name, skipped_seal_name
from movekd.cache.reader import FeatureCache, TeacherCache
from movekd.cache.schema import EncodingError, ShardSeal
from movekd.cache.stats import StatsAccumulator
from movekd.cache.storage import Storage, open_storage
from movekd.cache.writer import TeacherWriter, create_group, stats_checksum
from movekd.extract.encoding_error import ErrorSums

DONE = "control.json"
"""Written last: a cache without it is made again."""


def shuffle_cache(source: Path, target: Path, seed: int) -> None:
    """Write a cache in which every image has the features of another one, unless it exists.

    All teachers and arrays share one permutation. It is a single cycle, so no image keeps its own
    features. Statistics, sizes and shapes are those of ``source``.
    """
    if (target / DONE).exists():
        return
    cache, storage = _begin(source, target)
    for teacher in cache.teachers:
        store = cache[teacher]
        order = np.random.default_rng([seed, 70]).permutation(store.num_rows)
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        _copy_teacher(store, storage, other)
    (target / DONE).write_text(json.dumps({"seed": seed}) + "\n", encoding="utf-8")


def label_cache(source: Path, target: Path, counts: Mapping[scenes.Part, int], seed: int) -> None:
    """Write a cache whose dense teachers say the labels of their training, unless it exists.

    The tokens of `eva` and `convnext` become the one-hot digit of each patch, those of `sam` the
    strokes and edges of each patch; both are area-averaged to the cache's grid and turned by a
    random rotation into as many channels as the teacher has. `clip` was trained without dense
    labels and keeps its features.

    Args:
        source: complete cache of the corpus of a world.
        target: cache to make.
        counts: scenes of each part of the corpus.
        seed: of the world: it drew the scenes, and draws the rotations.
    """
    if (target / DONE).exists():
        return
    cache, storage = _begin(source, target)
    names: list[str] = []
    drawn: dict[str, list[Tensor]] = {teacher: [] for teacher in LABELS}
    for part, count in counts.items():
        first = 0
        for batch, _ in scenes.draw_part(part, count, seed, seed):
            names += [f"{part}_{first + i:05d}.png" for i in range(len(batch))]
            first += len(batch)
            for teacher, labels in LABELS.items():
                side = math.isqrt(cache[teacher].layout.num_tokens)
                drawn[teacher].append(resize_tokens(labels(batch), side))
    rows = torch.from_numpy(cache.rows(names))
    for teacher in cache.teachers:
        store = cache[teacher]
        if teacher not in LABELS:
            _copy_teacher(store, storage, np.arange(store.num_rows))
            continue
        labels_KNC = torch.cat(drawn[teacher])
        turned_KND = labels_KNC @ rotation(labels_KNC.shape[-1], store.layout.width, seed)
        tokens_KND = torch.empty_like(turned_KND)
        tokens_KND[rows] = turned_KND
        _write_tokens(store, storage, tokens_KND)
    (target / DONE).write_text(json.dumps({"seed": seed}) + "\n", encoding="utf-8")


def digit_labels(batch: scenes.Scenes, side: int) -> Tensor:
    """Return the digit of each patch as one-hot, float32 (B, N, 11)."""
    labels_BN = torch.from_numpy(scenes.grid_labels(batch, side)).flatten(1)
    return torch.nn.functional.one_hot(labels_BN, scenes.NUM_CLASSES).float()


LABELS: dict[str, Callable[[scenes.Scenes], Tensor]] = {
    "eva": lambda batch: digit_labels(batch, 8),
    "convnext": lambda batch: digit_labels(batch, 6),
    "sam": lambda batch: pretrain.stroke_labels(batch, 12),
}
"""Teacher -> what it was trained to say about each of its tokens (B, N, C)."""


def rotation(num_labels: int, width: int, seed: int) -> Tensor:
    """Return a random matrix (C, D) that keeps every distance between labels."""
    draw = torch.Generator().manual_seed(seed)
    columns_DC, _ = torch.linalg.qr(torch.randn(width, num_labels, generator=draw))
    rotation_CD: Tensor = columns_DC.T.contiguous()
    return rotation_CD


def _begin(source: Path, target: Path) -> tuple[FeatureCache, Storage]:
    """Empty the folder and give it the images of ``source``; return both caches."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in (CACHE_JSON, INDEX, NAMES):
        shutil.copy(source / name, target / name)
    return open_cache(source), open_storage(target)


def _copy_teacher(store: TeacherCache, storage: Storage, rows_K: npt.NDArray[np.int64]) -> None:
    """Copy a teacher; row k of the copy is row ``rows_K[k]`` of the source."""
    create_group(storage, store.spec, store.calibration, store.stats, store.num_rows)
    writer = TeacherWriter(storage, store.teacher, store.num_rows)
    for shard, seal in store.seals.items():
        stored = store.read(rows_K[slice(*seal.rows)]).stored
        arrays = {array: values.numpy() for array, values in stored.items()}
        _write_shard(writer, shard, seal, arrays, seal.error)
    _copy_skipped(store, storage)


def _write_tokens(store: TeacherCache, storage: Storage, tokens_KND: Tensor) -> None:
    """Write a teacher with other tokens and their channel statistics."""
    found = StatsAccumulator()
    found.add(tokens_KND)
    encoder = codec(store.codec_name)
    stats = found.result().for_codec(encoder)
    changes = {"channel_stats_xxh3_128": stats_checksum(stats)}
    calibration = store.calibration.model_copy(update=changes)
    create_group(storage, store.spec, calibration, stats, store.num_rows)
    writer = TeacherWriter(storage, store.teacher, store.num_rows)
    for shard, seal in store.seals.items():
        part_KND, errors = tokens_KND[slice(*seal.rows)], ErrorSums()
        stored = encoder.encode(part_KND, stats)
        errors.add(encoder.error(part_KND, stored, stats), part_KND.shape[0] * part_KND.shape[1])
        arrays = {array: values.numpy() for array, values in stored.items()}
        _write_shard(writer, shard, seal, arrays, errors.result())
    _copy_skipped(store, storage)


def _write_shard(
    writer: TeacherWriter,
    shard: int,
    seal: ShardSeal,
    arrays: dict[str, npt.NDArray[Any]],
    error: EncodingError,
) -> None:
    keys = seal.keys_xxh3_128
    writer.write_shard(shard, arrays, keys_xxh3_128=keys, skipped={}, error=error)


def _copy_skipped(store: TeacherCache, storage: Storage) -> None:
    """Copy the sealed table of skipped images; none was."""
    for name in (skipped_name(store.teacher), skipped_seal_name(store.teacher)):
        storage.write(name, [store.storage.read(name)])
