"""Tests of movekd.corpus.anyres, and of the views of an ImageTransform."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from movekd.corpus.anyres import (
    GRIDS,
    TILE,
    anyres_canvas,
    anyres_grid,
    anyres_grids,
    cut_tile,
    list_views,
    num_views,
)
from movekd.corpus.transforms import ImageTransform
from movekd.errors import UnreadableImageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

SIZES = [
    (640, 427), (427, 640), (336, 336), (337, 336), (336, 337), (672, 672), (673, 671),
    (672, 336), (336, 672), (1008, 336), (336, 1008), (500, 375), (375, 500), (600, 200),
    (200, 600), (641, 97), (97, 641), (630, 21), (3, 600), (1, 200), (200, 1), (1, 1),
    (2, 3), (7, 5), (17, 400), (1500, 1499), (1023, 341), (50, 60), (335, 671), (1344, 1009),
]  # fmt: skip


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])


@pytest.fixture(scope="module")
def processor():
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    return LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_views_are_bit_equal_to_the_llava_next_processor(photograph, processor, size) -> None:
    assert processor.image_grid_pinpoints == PINPOINTS
    image = photograph.resize(size)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    transform = ImageTransform(336, "stretch", "bicubic", CLIP_MEAN, CLIP_STD)
    data = png(image)
    assert len(expected) == num_views([size[0]], [size[1]])[0]
    for view, pixels in enumerate(expected):
        np.testing.assert_array_equal(transform(data, view), pixels)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_grids_are_those_of_select_best_resolution(width, height) -> None:
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution((height, width), PINPOINTS)
    assert anyres_grid(width, height) == (best[0] // TILE, best[1] // TILE)


def test_many_grids_at_once_are_those_of_one_at_a_time() -> None:
    widths, heights = np.array(SIZES).T
    grids = anyres_grids(widths, heights)
    assert [tuple(grid) for grid in grids.tolist()] == [anyres_grid(*size) for size in SIZES]
    assert {tuple(grid) for grid in grids.tolist()} == set(GRIDS)
    assert anyres_grids([], []).shape == (0, 2)


def test_views_are_listed_image_by_image() -> None:
    widths, heights = np.array(SIZES).T
    images, views = list_views(widths, heights, "anyres")
    counts = num_views(widths, heights).tolist()
    assert images.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
    assert views.tolist() == [view for count in counts for view in range(count)]
    assert (images.dtype, views.dtype) == (np.int64, np.int16)
    images, views = list_views(widths, heights, "base")
    assert images.tolist() == list(range(len(SIZES)))
    assert not views.any()


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from([1, 5, 16, 33]))
def test_tiles_reassemble_to_the_padded_image(width, height, size) -> None:
    levels = np.random.default_rng(width * 301 + height).integers(1, 256, (height, width, 3))
    image = Image.fromarray(levels.astype(np.uint8))
    rows, columns = anyres_grid(width, height)
    canvas = anyres_canvas(image, size, Image.Resampling.BILINEAR)
    assert canvas.size == (columns * size, rows * size)
    put = Image.new("RGB", canvas.size, (9, 9, 9))
    for view in range(1, rows * columns + 1):
        row, column = divmod(view - 1, columns)
        put.paste(cut_tile(canvas, size, view), (column * size, row * size))
    assert put.tobytes() == canvas.tobytes()
    is_image = np.asarray(canvas).any(axis=-1)  # bilinear never undershoots the darkest, 1
    covered_rows, covered_columns = is_image.any(axis=1), is_image.any(axis=0)
    assert covered_rows.all() or covered_columns.all()  # it fills the grid one way
    assert is_image.sum() == covered_rows.sum() * covered_columns.sum()  # one rectangle,
    for covered in (covered_rows, covered_columns):  # in the middle
        before, after = covered.argmax(), covered[::-1].argmax()
        assert after - before in (0, 1)


def test_tiles_of_another_size_show_the_same_part_of_the_image(photograph) -> None:
    small, large = (
        ImageTransform(size, "crop", "bicubic", (0, 0, 0), (1, 1, 1)) for size in (64, 192)
    )
    data = png(photograph)
    for view in range(1, 5):
        shrunk = large(data, view).reshape(3, 64, 3, 64, 3).mean(axis=(2, 4))
        assert np.abs(shrunk - small(data, view)).mean() < 0.02
        assert np.abs(shrunk - small(data, view % 4 + 1)).mean() > 0.1


def test_the_grid_is_that_of_the_image_as_shown() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side in the file
    lying = Image.new("RGB", (1200, 400), (200, 100, 50))
    transform = ImageTransform(8, "stretch", "nearest", (0, 0, 0), (1, 1, 1))
    data = png(lying, exif=exif)
    assert anyres_grid(400, 1200) == (3, 1)
    for view in (1, 2, 3):
        assert (transform(data, view) > 0).all()


@pytest.mark.parametrize("view", [-1, 3, 70])
def test_a_view_that_is_not_there_is_a_sentence(view) -> None:
    transform = ImageTransform(8, "stretch", "nearest", (0, 0, 0), (1, 1, 1))
    with pytest.raises(UnreadableImageError, match=rf"view {view} .*10 x 5 .*views 0 to 2"):
        transform(png(Image.new("RGB", (10, 5))), view)
