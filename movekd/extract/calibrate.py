"""Calibrate a teacher: fix channel statistics, batch size and dtype before its first Zarr shard.

Input: a loaded teacher and a corpus. Output: an empty group in the cache and a sealed calibration.
Resumed builds, appended images and other machines use the same calibration.
"""

from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from movekd.cache import layout
from movekd.cache.catalog import read_cache_json
from movekd.cache.codecs import codec
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
from movekd.extract.choose_rank import CodecChoice
from movekd.extract.locks import wait_for_writers
from movekd.extract.options import BuildContext, BuildOptions
from movekd.extract.run_teacher import LiveFeatures, live_features
from movekd.extract.shard_buffer import stored_output
from movekd.extract.spec_defaults import with_defaults
from movekd.teachers import Teacher

LEAST_VARIATION = 0.02
"""Features of different images that differ by less, relative to their size, are reported.

Random teachers of all providers have 0.78 to 0.96 on photographs. With a mean and std for levels of
0 to 255 instead of 0 to 1, all images are nearly one colour to them: 0.0009 to 0.0028.
"""


def delete_teacher(storage: Storage, teacher: str) -> None:
    """Delete a teacher's seals, then its features, so that nothing half-valid remains.

    The calibration is deleted first. A worker that outlived its build may still write a Zarr shard,
    but seals no other one without the calibration; this function waits for that shard.
    """
    storage.delete(layout.calibration_name(teacher))
    wait_for_writers(storage, teacher)
    for name in storage.sizes(layout.seals_name(teacher)):
        if not PurePosixPath(name).name.startswith("."):  # keep the caller's locks
            storage.delete(name)
    storage.delete_folder(layout.group_name(teacher))


def read_other_calibration(
    source: Storage, spec: CacheSpec, geometry: Geometry
) -> tuple[Calibration, ChannelStats]:
    """Return the sealed calibration of the same spec and geometry in another cache.

    Raises:
        CacheError: it has none, or one of another spec or geometry; the message names the key.
    """
    held = read_cache_json(source).geometry
    if held != geometry:
        raise CacheError(
            f"{source.url} has geometry '{held}', the build asks for '{geometry}'; channel "
            f"statistics depend on the geometry. Give --resize-mode {held}, or leave "
            "--channel-stats out."
        )
    calibration = sealed_calibration(source, with_defaults(spec, own=source))
    if calibration is None:
        raise CacheError(
            f"{source.url} holds no calibration of '{spec.name}', so it has no channel statistics "
            "to take over. Build that teacher there first, or leave --channel-stats out."
        )
    sealed = TeacherContents(source, spec.name, 0)
    return calibration, ChannelStats.from_numpy(sealed.group_arrays)


def import_calibration(
    context: BuildContext, spec: CacheSpec, calibration: Calibration, stats: ChannelStats
) -> None:
    """Start a teacher with another cache's calibration, unless it has that one already."""
    storage = context.storage
    own = sealed_calibration(storage, spec)
    if own is None:
        delete_teacher(storage, spec.name)
        create_group(storage, spec, calibration, stats, context.catalog.num_rows)
    elif own.channel_stats_xxh3_128 != calibration.channel_stats_xxh3_128:
        raise CacheError(
            f"teacher '{spec.name}' in {storage.url} has other channel statistics than those of "
            "--channel-stats; leave --channel-stats out, or --overwrite the teacher."
        )


def sealed_calibration(storage: Storage, spec: CacheSpec) -> Calibration | None:
    """Return the calibration of an earlier build of the same spec, or None for a new teacher."""
    calibration = read_calibration(storage, spec.name)
    if calibration is None or calibration.spec_fingerprint == spec.fingerprint:
        return calibration
    stored = TeacherContents(storage, spec.name, 0).spec
    differs = stored.differences(spec, "asked for")
    if (stored.weights == "random") != (spec.weights == "random"):
        differs.append(f"weights are {stored.weights!r} in the cache")
    raise CacheError(
        f"teacher '{spec.name}' in {storage.url} was built from another spec: "
        f"{'; '.join(differs)}. Give the old value, use another --cache, or --overwrite it."
    )


def calibrated_options(options: BuildOptions, calibration: Calibration) -> BuildOptions:
    """Return the options with the dtype, batch size and compilation of a sealed calibration."""
    return replace(
        options,
        dtype=getattr(torch, calibration.dtype),
        batch_size=calibration.batch_size,
        compile=calibration.is_compiled,
    )


def calibrate(context: BuildContext, spec: CacheSpec, teacher: Teacher) -> Calibration:
    """Measure channel statistics, seal them with dtype and batch size, and create the group.

    The images are those with the smallest keys. A key is the SHA-256 of the image, so this is a
    uniform draw that does not depend on the (biased) order of the corpus. All views of them count,
    because all are stored.
    """
    corpus, catalog, options = context.corpus, context.catalog, context.options
    delete_teacher(context.storage, spec.name)
    if options.compile:
        teacher.compile_forward()
    if options.batch_size is None:
        options = replace(options, batch_size=largest_batch_size(teacher, options))
    chosen = by_key(corpus)[: spec.calibration_images]
    is_chosen = np.isin(catalog.images, chosen)
    images, views = catalog.images[is_chosen], catalog.views[is_chosen]
    statistics, variation = StatsAccumulator(), Variation()
    choice = CodecChoice(spec, chosen)
    label = f"{spec.name}: calibrate"
    features: LiveFeatures | None = None
    for features in live_features(
        teacher, corpus, catalog.geometry, images, views, options, {}, context.progress, label
    ):
        features = stored_output(features, spec)
        codec(spec.codec).arrays(*features.tokens_BND.shape[1:])  # a width may be refused: at once
        statistics.add(features.tokens_BND)
        variation.add(features.tokens_BND)
        choice.keep(features)
    stats = statistics.result(spec.std_floor or 0.0)
    codec_name = choice.result(stats, options, context.progress)
    stats = stats.for_codec(codec(codec_name))
    assert features is not None  # result() raises when nothing was added
    if (share := variation.result()) < LEAST_VARIATION:
        context.tell(
            f"{spec.name}: the features of different images differ by only {share:.2%} of their "
            f"size; expected more than {LEAST_VARIATION:.0%}. Look at mean and std of the spec "
            f"({list(spec.mean)}, {list(spec.std)}): they are for pixels of 0 to 1; divide values "
            "for 0 to 255 by 255. Then build with --overwrite."
        )
    calibration = Calibration(
        spec_fingerprint=spec.fingerprint,
        weights_sha256=teacher.weights_sha256,
        dtype=str(options.dtype).removeprefix("torch."),
        is_compiled=options.compile,
        batch_size=options.forward_batch_size,
        num_images=len(chosen),
        **features.shape._asdict(),
        channel_stats_xxh3_128=stats_checksum(stats),
        codec=None if codec_name == spec.codec else codec_name,
    )
    create_group(context.storage, spec, calibration, stats, catalog.num_rows)
    return calibration


class Variation:
    """How much features vary between images, relative to their size. No batch is kept.

    Positions are compared with themselves in other images: what a position embedding adds is no
    variation.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, tokens_BND: torch.Tensor) -> None:
        """Add a batch of images."""
        values = tokens_BND.double().cpu()
        self._count += len(values)
        self._sums = self._sums + values.sum(0)
        self._squares = self._squares + values.square().sum(0)

    def result(self) -> float:
        """Return the ratio of two root mean squares, the median of the channels, in 0..1.

        Above: the deviation of a feature from its mean over images, at its position. Below: the
        feature. One image, or channels that are all zero, have no ratio: 1.
        """
        if self._count < 2:
            return 1.0
        mean_ND, square_ND = self._sums / self._count, self._squares / self._count
        size_D = square_ND.mean(0)
        between_D = (square_ND - mean_ND.square()).mean(0).clamp(min=0)
        shares = (between_D / size_D)[size_D > 0]
        return float(shares.sqrt().median()) if len(shares) else 1.0


def by_key(corpus: Corpus) -> npt.NDArray[np.int64]:
    """Return the positions of the images sorted by key, which is a fixed uniform draw."""
    return np.asarray(pc.sort_indices(corpus.index["key"]), np.int64)
