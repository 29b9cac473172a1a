"""Run teachers again on some rows and compare: `movekd cache verify --recompute N`.

Checksums find bytes that changed after they were sealed. They do not find what was wrong before: a
build on faulty memory, a changed library, rows that were swapped by hand and sealed again.

Input: a cache, the corpus that it was built from, and the teachers' weights. Output: one message
per difference.

Legend: B batch, N tokens, D channels, H heads.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.analysis.resolve_spec import spec_to_run
from movekd.cache import layout
from movekd.cache.reader import FeatureCache, TeacherCache, open_cache
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import Storage
from movekd.corpus.index import Corpus, find_rows
from movekd.errors import ConfigError, CorpusError, MovekdError, did_you_mean
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.run_teacher import LiveFeatures, live_features
from movekd.extract.shard_buffer import stored_output
from movekd.teachers import load_teacher

SLACK: Mapping[torch.dtype, float] = {
    torch.float32: 5e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Relative difference per token that a forward pass of this dtype may have from the build's.

The last bits of a row depend on its batch and on the device, and dozens of layers amplify them; a
GPU computes float32 convolutions in TF32. CLIP-L with random weights differs from float32 by 0.3%
in float16 and 1.4% in bfloat16. The features of another image differ by about 100%.
"""
_HALF = 1e-3
"""Twice the relative rounding of float16, in which [CLS] and attention are stored."""


def verify_features(
    cache: str | Path | Storage,
    corpus: Corpus,
    num_rows: int,
    *,
    options: BuildOptions,
    teachers: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
    specs: Sequence[CacheSpec] = (),
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[str]:
    """Yield one message per row, of rows drawn at random, that differs from its teacher's output.

    A row passes if, with z a stored and t a recomputed token in standardised channels,

        max_n ||z[n] - t[n]|| / ||t[n]||  <=  max(1.5 e, e + slack)

    where e is the largest error in the seal of its Zarr shard and slack that of ``SLACK``. [CLS]
    and attention may differ by float16's rounding and the slack. The image must have the SHA-256
    that is its key, and the weights must be those of the sealed calibration.

    Args:
        cache: the cache to check.
        corpus: the images that it was built from.
        num_rows: rows per teacher, drawn among those that are built and were not skipped.
        options: device and batch size; the dtype is that of the sealed calibration.
        teachers: which teachers. Default: all.
        weights: teacher -> ``hub``, a directory or a file, because a cache does not store where its
            weights came from. Default: ``hub``; random weights are drawn from the spec's seed.
        specs: the user's specs of teachers that were built from a YAML file, matched by name and
            fingerprint. ``provider: python`` needs one, see ``analysis.resolve_spec``.
        seed: seed of the draw.
        progress: called after each batch.

    Raises:
        ConfigError: the cache does not hold a teacher.
        CacheError: no cache at this path.
    """
    opened = open_cache(cache)
    given = {spec.name: spec for spec in specs}
    for name in (*teachers, *(weights or {}), *given):
        if name not in opened.teachers:
            raise ConfigError(
                f"{opened.url} holds no teacher '{name}'.{did_you_mean(name, opened.teachers)} It "
                f"holds: {', '.join(opened.teachers) or 'none'}."
            )
    for name in teachers or opened.teachers:
        try:
            spec = spec_to_run(opened[name], given.get(name), (weights or {}).get(name))
            yield from _recompute_teacher(opened, spec, corpus, num_rows, options, seed, progress)
        except MovekdError as error:
            yield f"'{name}' in {opened.url} was not recomputed: {error}"


def _recompute_teacher(
    cache: FeatureCache,
    spec: CacheSpec,
    corpus: Corpus,
    num_rows: int,
    options: BuildOptions,
    seed: int,
    progress: Progress,
) -> Iterator[str]:
    name, store = spec.name, cache[spec.name]
    rows = _draw(cache, store, num_rows, seed)
    at = np.searchsorted(cache.catalog.rows, rows)
    keys, views = cache.catalog.index.take("key", at), cache.catalog.views[at].tolist()
    images = find_rows(keys.to_pylist(), corpus.index, corpus.names)
    row_of: dict[tuple[int, int], int] = {}  # image and view -> row
    key_of = dict(zip(rows.tolist(), keys.to_pylist(), strict=True))
    for row, image, view in zip(rows.tolist(), images.tolist(), views, strict=True):
        problem = _image_problem(corpus, image, key_of[row])
        if problem is None:
            row_of[image, view] = row
        else:
            yield f"{_row_name(store, row, key_of[row])}: {problem}"
    if not row_of:
        return
    options = replace(options, dtype=getattr(torch, store.calibration.dtype))
    teacher = load_teacher(spec, options.device, options.dtype)
    if teacher.weights_sha256 != store.calibration.weights_sha256:
        sealed = store.calibration.weights_sha256
        yield (
            f"the weights of '{name}' have SHA-256 {teacher.weights_sha256[:16]}..., {cache.url} "
            f"was built with {sealed[:16]}...; give those with --weights. Nothing of this teacher "
            "was compared."
        )
        return
    unreadable: dict[int, str] = {}
    chosen = np.array(sorted(row_of), np.int64)
    batches = live_features(
        teacher,
        corpus,
        cache.geometry,
        chosen[:, 0],
        chosen[:, 1].astype(np.int16),
        options,
        unreadable,
        progress,
        f"{name}: recompute",
    )
    for live in batches:
        batch_rows = [row_of[view] for view in zip(live.images, live.views, strict=True)]
        for row, problem in _differences(store, batch_rows, live, SLACK[options.dtype]):
            seal = layout.seal_name(name, row // store.layout.rows_per_shard)
            yield (
                f"{_row_name(store, row, key_of[row])}: {problem}. Its features are wrong, or "
                f"those of another image; delete {cache.url}/{seal} and build again."
            )
    for (image, _), row in sorted(row_of.items()):
        if image not in unreadable:
            continue
        yield (
            f"{_row_name(store, row, key_of[row])} has features, but its image is unreadable now: "
            f"{unreadable[image]} Compare the versions in the group's attributes with yours."
        )


def _draw(
    cache: FeatureCache, store: TeacherCache, num_rows: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return rows with features, ascending."""
    rows = cache.catalog.rows
    missing = np.isin(rows // store.layout.rows_per_shard, store.missing_shards)
    skipped = np.isin(rows, np.array(list(store.skipped), np.int64))
    rows = rows[~missing & ~skipped]
    size = min(num_rows, len(rows))
    drawn = np.random.default_rng(seed).choice(rows, size, replace=False)
    return np.sort(drawn).astype(np.int64)


def _image_problem(corpus: Corpus, image: int, key: str) -> str | None:
    """Return what is wrong with the image of a key, or None."""
    if image < 0:
        return f"{corpus.data_dir} holds no such image; give the --shards that it was built from."
    try:
        found = hashlib.sha256(corpus.read_image(image)).hexdigest()
    except CorpusError as error:
        return str(error)
    if found == key:
        return None
    return (
        f"the image in {corpus.data_dir} has SHA-256 {found[:16]}..., its key is another; the "
        "shard is damaged. Restore it, or pack the corpus again."
    )


def _differences(
    store: TeacherCache, rows: Sequence[int], live: LiveFeatures, slack: float
) -> Iterator[tuple[int, str]]:
    """Yield each row that differs, with the differences."""
    live = stored_output(live, store.spec)
    stored = store.read(rows).to(live.tokens_BND.device)
    stats = store.stats.to(live.tokens_BND.device)
    exact_BND = stats.standardise(live.tokens_BND)
    found = {"tokens": _relative(stored.standardised_BND, exact_BND).amax(-1)}
    if live.cls_BD is not None and stored.cls_BD is not None:
        found["[CLS]"] = _relative(stored.cls_BD, live.cls_BD)
    if live.cls_attention_BHN is not None and stored.cls_attention_BHN is not None:
        found["attention"] = _relative(stored.cls_attention_BHN, live.cls_attention_BHN).amax(-1)
    for index, row in enumerate(rows):
        sealed = store.seals[row // store.layout.rows_per_shard].error.max
        bounds = {"tokens": max(1.5 * sealed, sealed + slack)}
        said = []
        for what, error_B in found.items():
            error, bound = error_B[index].item(), bounds.get(what, _HALF + slack)
            if not error <= bound:  # NaN as well
                said.append(f"{what} by {error:.3%} (at most {bound:.3%} expected)")
        if said:
            yield row, f"differs from the teacher's output: {', '.join(said)}"


def _relative(found_XD: Tensor, exact_XD: Tensor) -> Tensor:
    """Return ``||found - exact|| / ||exact||`` over the last dimension; 0 where both are zero."""
    difference_X = (found_XD - exact_XD).norm(dim=-1)
    return torch.where(
        difference_X == 0, 0.0, difference_X / exact_XD.norm(dim=-1).clamp(min=1e-30)
    )


def _row_name(store: TeacherCache, row: int, key: str) -> str:
    return f"{store.storage.url}: row {row} of '{store.teacher}' (key {key[:16]}...)"
