"""What is settled before a teacher's first Zarr shard, once: channel statistics, batch size, dtype.

Comes in: a loaded teacher and a corpus. Goes out: an empty group in the cache and its sealed
calibration, which every resume, appended image and other machine goes on with.
"""

from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from movekd.cache import layout
from movekd.cache.catalog import Catalog, read_cache_json
from movekd.cache.contents import TeacherContents, read_calibration
from movekd.cache.schema import Calibration
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats, StatsAccumulator
from movekd.cache.storage import Storage
from movekd.cache.writer import create_group, stats_checksum
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import Geometry
from movekd.errors import CacheError
from movekd.extract.batch_size import largest_batch_size
from movekd.extract.locks import wait_for_writers
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.run_teacher import LiveFeatures, live_features
from movekd.teachers import Teacher


def delete_teacher(storage: Storage, teacher: str) -> None:
    """Delete a teacher's features and seals, the seals first: nothing half-valid remains.

    The calibration goes before all others. Whoever outlives its build and still writes a Zarr
    shard then seals no other one; that one is waited for.
    """
    storage.delete(layout.calibration_name(teacher))
    wait_for_writers(storage, teacher)
    for name in storage.sizes(layout.seals_name(teacher)):
        if not PurePosixPath(name).name.startswith("."):  # the lock that the caller holds
            storage.delete(name)
    storage.delete_folder(layout.group_name(teacher))


def calibration_of(
    source: Storage, spec: CacheSpec, geometry: Geometry
) -> tuple[Calibration, ChannelStats]:
    """Return the sealed calibration of the same spec and geometry in another cache.

    Raises:
        CacheError: it has none, or one of another spec or geometry; names the key.
    """
    held = read_cache_json(source).geometry
    if held != geometry:
        raise CacheError(
            f"{source.url} is of geometry '{held}', the build asks for '{geometry}': the same "
            f"images have other statistics there. Give --resize-mode {held}, or leave "
            "--channel-stats out."
        )
    calibration = sealed_calibration(source, spec)
    if calibration is None:
        raise CacheError(
            f"{source.url} holds no calibration of '{spec.name}' to take channel statistics from; "
            "build that teacher there first, or leave --channel-stats out."
        )
    sealed = TeacherContents(source, spec.name, 0)
    return calibration, ChannelStats.from_numpy(sealed.channel_mean, sealed.channel_std)


def begin_with(
    storage: Storage,
    catalog: Catalog,
    spec: CacheSpec,
    calibration: Calibration,
    stats: ChannelStats,
) -> None:
    """Begin a teacher with another cache's calibration, unless that was done already."""
    own = sealed_calibration(storage, spec)
    if own is None:
        delete_teacher(storage, spec.name)
        create_group(storage, spec, calibration, stats, catalog.num_rows)
    elif own.channel_stats_xxh3_128 != calibration.channel_stats_xxh3_128:
        raise CacheError(
            f"teacher '{spec.name}' in {storage.url} was begun with channel statistics of its own; "
            "leave --channel-stats out, or --overwrite it."
        )


def sealed_calibration(storage: Storage, spec: CacheSpec) -> Calibration | None:
    """Return the calibration of an earlier build of the same spec, or None for a new teacher."""
    calibration = read_calibration(storage, spec.name)
    if calibration is None or calibration.spec_fingerprint == spec.fingerprint:
        return calibration
    stored = TeacherContents(storage, spec.name, 0).spec.model_dump()
    asked = spec.model_dump()
    differs = [
        f"{key} is {stored[key]!r} in the cache, {asked[key]!r} asked for"
        for key in asked
        if stored[key] != asked[key] and key not in ("description", "max_error", "weights")
    ]
    if (stored["weights"] == "random") != (asked["weights"] == "random"):
        differs.append(f"weights are {stored['weights']!r} in the cache")
    raise CacheError(
        f"teacher '{spec.name}' in {storage.url} was built from another spec: "
        f"{'; '.join(differs)}. Give the old value, use another --cache, or --overwrite it."
    )


def settled(options: BuildOptions, calibration: Calibration) -> BuildOptions:
    """Return the options with what a sealed calibration has settled."""
    return replace(
        options,
        dtype=getattr(torch, calibration.dtype),
        batch_size=calibration.batch_size,
        compile=calibration.is_compiled,
    )


def calibrate(
    storage: Storage,
    corpus: Corpus,
    catalog: Catalog,
    spec: CacheSpec,
    teacher: Teacher,
    options: BuildOptions,
    progress: Progress,
) -> Calibration:
    """Fix channel statistics, dtype and batch size once, and make the group.

    The images are those with the smallest keys: a key is the SHA-256 of the image, so that is a
    uniform draw which does not depend on the corpus' (biased) order. All views of them count, as
    they will be stored.
    """
    delete_teacher(storage, spec.name)
    if options.compile:
        teacher.compile_forward()
    if options.batch_size is None:
        options = replace(options, batch_size=largest_batch_size(teacher, options))
    chosen = by_key(corpus)[: spec.calibration_images]
    places = np.flatnonzero(np.isin(catalog.images, chosen))
    images, views = catalog.images[places], catalog.views[places]
    statistics, what = StatsAccumulator(), f"{spec.name}: calibrate"
    features: LiveFeatures | None = None
    for features in live_features(
        teacher, corpus, catalog.geometry, images, views, options, {}, progress, what
    ):
        if spec.grid != "native":
            features = features.resize_output(spec.grid)
        statistics.add(features.tokens_BND)
    stats = statistics.result()
    assert features is not None  # result() raises when nothing was added
    cls, attention = features.cls_BD, features.cls_attention_BHN
    calibration = Calibration(
        spec_fingerprint=spec.fingerprint,
        weights_sha256=teacher.weights_sha256,
        dtype=str(options.dtype).removeprefix("torch."),
        is_compiled=options.compile,
        batch_size=options.images_a_pass,
        num_images=len(chosen),
        num_tokens=features.tokens_BND.shape[1],
        width=features.tokens_BND.shape[2],
        cls_width=None if cls is None else cls.shape[1],
        num_heads=None if attention is None else attention.shape[1],
        channel_stats_xxh3_128=stats_checksum(stats),
    )
    create_group(storage, spec, calibration, stats, catalog.num_rows)
    return calibration


def by_key(corpus: Corpus) -> npt.NDArray[np.int64]:
    """Return the positions of the images in the order of their keys: a fixed uniform draw."""
    return np.asarray(pc.sort_indices(corpus.index["key"]), np.int64)
