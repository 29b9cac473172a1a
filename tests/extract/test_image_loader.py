import dataclasses
import io
import os
import random
import select
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from corpus_files import make_unreadable
from movekd.cache.reader import open_cache
from movekd.corpus.index import open_corpus
from movekd.corpus.webdataset import index_webdataset
from movekd.corpus.worker_process import end_with_parent
from movekd.errors import CorpusError
from movekd.extract import image_loader
from movekd.extract.image_loader import ImageLoader, image_transform, pixel_batches
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache

BATCHES = [[3, 1], [0], [5, 4, 2, 7]]


def loader_of(corpus, wanted, order, num_workers) -> ImageLoader:
    """The base views of a corpus: a row id is an image."""
    images = np.arange(len(corpus))
    views = np.zeros(len(corpus), np.int16)
    return ImageLoader(corpus, images, views, wanted, order, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_whatever_the_workers(corpus_dir, tiny_specs, num_workers) -> None:
    corpus = open_corpus(corpus_dir)
    transform = image_transform(tiny_specs[0], "crop")
    found = list(pixel_batches(corpus, transform, BATCHES, num_workers=num_workers))
    assert [batch.images for batch in found] == BATCHES
    for batch in found:
        assert batch.unreadable == {}
        expected = [transform(corpus.read_image(image)) for image in batch.images]
        for pixels, single in zip(batch.pixels("cpu"), expected, strict=True):
            assert torch.equal(pixels, torch.from_numpy(single))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoding_draws_from_no_generator_of_the_process(
    corpus_dir, tiny_specs, num_workers
) -> None:
    """Another thread may be drawing a teacher's random weights from PyTorch's."""
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    transform = image_transform(tiny_specs[0], "crop")
    found = pixel_batches(open_corpus(corpus_dir), transform, BATCHES, num_workers=num_workers)
    assert len(list(found)) == len(BATCHES)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_a_teachers_own_geometry_wins(tiny_specs) -> None:
    assert image_transform(tiny_specs[0], "pad").geometry == "pad"
    own = tiny_specs[0].with_changes(geometry="longest_side")
    assert image_transform(own, "pad").geometry == "longest_side"


def test_unreadable_images_keep_their_place(damaged_corpus, tiny_specs) -> None:
    data, damaged = damaged_corpus
    corpus = open_corpus(data)
    transform = image_transform(tiny_specs[0], "crop")
    batches = [[damaged, 0], [1, 2, damaged], [damaged]]
    one, two, three = pixel_batches(corpus, transform, batches, num_workers=0)
    assert list(one.unreadable) == [0]
    assert list(two.unreadable) == [2]
    assert torch.equal(one.pixels("cpu")[1], torch.from_numpy(transform(corpus.read_image(0))))
    assert (two.levels_BHWC[2] == 0).all()
    assert list(three.unreadable) == [0]


@pytest.mark.parametrize("geometry", ["crop", "pad", "stretch", "longest_side"])
@pytest.mark.parametrize("fill", [None, (0.2, 0.5, 0.9)])
def test_the_device_normalises_as_the_transform_does(
    corpus_dir, tiny_specs, geometry, fill
) -> None:
    """Bit by bit; ``longest_side`` pads after it, with values that no byte holds."""
    corpus = open_corpus(corpus_dir)
    spec = tiny_specs[0].with_changes(mean=(0.1, 0.35, 0.7), std=(0.2, 0.3, 0.4), fill=fill)
    transform = image_transform(spec, geometry)
    (batch,) = pixel_batches(corpus, transform, [range(24)], num_workers=0)
    expected = np.stack([transform(corpus.read_image(image)) for image in range(24)])
    assert torch.equal(batch.pixels("cpu"), torch.from_numpy(expected))
    half = batch.pixels("cpu", torch.bfloat16)
    assert torch.equal(half, torch.from_numpy(expected).bfloat16())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_is_decoded_once_for_all_who_want_it(
    corpus_dir, tiny_specs, num_workers, monkeypatch, tmp_path
) -> None:
    """By two sizes, in other batches and with repeats, one of them far ahead of the other."""
    decoded = tmp_path / "decoded"
    original = image_loader.decode_image

    def counted(data):
        with decoded.open("a") as file:
            file.write("1")
        return original(data)

    monkeypatch.setattr(image_loader, "decode_image", counted)
    corpus = open_corpus(corpus_dir)
    small = image_transform(tiny_specs[0], "crop")
    large = dataclasses.replace(small, image_size=80)
    wanted = {small: [0, 1, 2, 3, 2, 9], large: [2, 3, 9, 12]}
    loader = loader_of(corpus, wanted, [0, 1, 2, 3, 9, 12], num_workers)
    for transform, batch in (
        (small, [0, 1, 2]), (small, [3, 2]), (large, [2]), (small, [9]), (large, [3, 9, 12])
    ):  # fmt: skip
        found = loader.next_batch(batch, transform)
        assert found.images == batch
        expected = np.stack([transform(corpus.read_image(image)) for image in batch])
        assert torch.equal(found.pixels("cpu"), torch.from_numpy(expected))
    assert decoded.read_text() == "1" * 6
    assert not loader._squares  # nothing is kept once all have had it


def test_teachers_that_differ_in_mean_and_std_alone_share_what_is_resized(
    corpus_dir, tiny_specs, monkeypatch
) -> None:
    corpus = open_corpus(corpus_dir)
    one = image_transform(tiny_specs[0].with_changes(fill=(0.5, 0.5, 0.5)), "pad")
    other = dataclasses.replace(one, mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1))
    resized = []
    original = image_loader.ImageViews.square
    monkeypatch.setattr(
        image_loader.ImageViews,
        "square",
        lambda self, view: resized.append(1) or original(self, view),
    )
    loader = loader_of(corpus, {one: [4, 5], other: [4]}, [4, 5], 0)
    first, second = loader.next_batch([4, 5], one), loader.next_batch([4], other)
    assert len(resized) == 2
    monkeypatch.undo()
    for batch, transform in ((first, one), (second, other)):
        expected = np.stack([transform(corpus.read_image(image)) for image in batch.images])
        assert torch.equal(batch.pixels("cpu"), torch.from_numpy(expected))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tar_that_became_shorter_is_a_sentence(
    tmp_path, corpus_dir, tiny_specs, num_workers
) -> None:
    shutil.copytree(corpus_dir, tmp_path / "data")
    corpus = open_corpus(tmp_path / "data")
    shard = tmp_path / "data" / corpus.shards[0]
    shard.write_bytes(shard.read_bytes()[:5000])
    transform = image_transform(tiny_specs[0], "crop")
    with pytest.raises(CorpusError) as caught:
        list(pixel_batches(corpus, transform, [range(24)], num_workers=num_workers))
    assert "\n" not in str(caught.value)
    assert shard.name in str(caught.value)


@pytest.mark.parametrize("num_views", [1, 3])
def test_groups_keep_the_views_of_an_image_together_and_stay_small(num_views) -> None:
    shown = np.repeat(np.arange(100), num_views)
    for view_bytes, most in ((100, 8), (3 * 1024**2, 8 if num_views == 1 else 3), (10**9, 1)):
        cuts = image_loader._cuts(shown, view_bytes)
        groups = list(image_loader._groups(shown, cuts))
        assert np.concatenate(groups).tolist() == shown.tolist()
        assert {len(set(group)) for group in groups[:-1]} == {most}
        assert sum(len(set(group)) for group in groups) == 100


def picture(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A gradient in any of Pillow's modes."""
    ramp = np.arange(size[0] * size[1]).reshape(size[1], size[0]) % 251
    image = Image.fromarray(np.stack([ramp, ramp // 2, 255 - ramp], -1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    return image.convert(mode)


def odd_images() -> dict[str, tuple[bytes, bool]]:
    """Files that corpora hold, name -> (bytes, whether a viewer shows them)."""

    def saved(image, format, **options):
        out = io.BytesIO()
        image.save(out, format, **options)
        return out.getvalue()

    rotated = Image.Exif()
    rotated[0x0112] = 6
    jpeg = saved(picture("RGB", (64, 64)), "JPEG")
    frames = [picture("P"), picture("L")]
    return {
        "cmyk.jpg": (saved(picture("CMYK"), "JPEG"), True),
        "16bit.png": (saved(picture("I;16"), "PNG"), True),
        "animated.gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), True),
        "exif.jpg": (saved(picture("RGB"), "JPEG", exif=rotated), True),
        "palette.png": (saved(picture("P"), "PNG"), True),
        "alpha.png": (saved(picture("RGBA"), "PNG"), True),
        "pixel.png": (saved(picture("RGB", (1, 1)), "PNG"), True),
        "été 猫.png": (saved(picture("L"), "PNG"), True),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], False),
        "empty.jpg": (b"", False),
        "text.png": (b"no image", False),
        "bomb.png": (saved(Image.new("1", (20_000, 20_000)), "PNG"), False),
        "strip.png": (saved(picture("RGB", (900, 2)), "PNG"), False),
    }


def test_odd_images_are_shown_or_listed_and_the_build_goes_on(tmp_path, tiny_specs) -> None:
    """In tars with an empty one, a truncated one, keys that lead outside, and keys twice."""
    wds, images = tmp_path / "wds", odd_images()
    wds.mkdir()
    with tarfile.open(wds / "a.tar", "w") as tar:
        for name, (data, _) in [*images.items(), ("../../evil.png", images["pixel.png"]),
                                ("alpha.png", images["palette.png"])]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (wds / "empty.tar").write_bytes(b"")
    (wds / "truncated.tar").write_bytes((wds / "a.tar").read_bytes()[:700])
    report = index_webdataset(wds, num_workers=1)
    shown = sorted(name for name, (_, is_shown) in images.items() if is_shown)
    unreadable = {name for name, (_, is_shown) in images.items() if not is_shown}
    assert {name.rpartition(":")[2].rpartition("/")[2] for name, _ in report.unreadable_images} == (
        unreadable
    )
    corpus = open_corpus(wds)
    assert len(corpus) == len(shown)
    victim = int(corpus.rows(["palette"])[0])
    key = make_unreadable(wds, victim)
    corpus = open_corpus(wds)
    options = BuildOptions(batch_size=4, num_workers=0)
    (summary,) = build_cache(
        tmp_path / "cache", corpus, tiny_specs[:1], geometry="crop", options=options
    )
    assert summary.status.images == len(shown)
    assert list(summary.skipped) == [key]
    targets = open_cache(tmp_path / "cache")["clip"].read(range(len(shown)))
    finite = targets.tokens_BND.isfinite().all(-1).all(-1)
    assert [row for row, is_finite in enumerate(finite.tolist()) if not is_finite] == [victim]
    assert not list(tmp_path.parent.glob("evil*"))


def test_decoding_processes_end_with_a_build_that_was_killed_at_their_start(
    corpus_dir, tiny_specs
) -> None:
    """Between the fork and PyTorch's own watch, which would take the new parent for the old one.

    The child makes a pipe that only its decoding processes keep open, so the end of all of them is
    the end of the pipe.
    """
    transform = image_transform(tiny_specs[0], "crop")
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)

        def stopped(worker: int) -> None:
            """Kill the build when a decoding process starts, and go on when it is dead."""
            end_with_parent(worker)
            os.kill(os.getppid(), signal.SIGKILL)
            while os.getppid() == build:
                pass

        build = os.getpid()
        image_loader.DataLoader = lambda dataset, **given: DataLoader(
            dataset, **given | {"worker_init_fn": stopped}
        )
        list(pixel_batches(open_corpus(corpus_dir), transform, BATCHES, num_workers=2))
        os._exit(0)
    os.close(writes)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    is_over, _, _ = select.select([reads], [], [], 60)
    assert is_over
    assert os.read(reads, 1) == b""
    os.close(reads)
