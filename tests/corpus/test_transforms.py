"""Tests of movekd.corpus.transforms."""

import contextlib
import io
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from movekd.corpus.decode import decode_image, probe_image
from movekd.corpus.transforms import ImageTransform, apply_geometry
from movekd.errors import UnreadableImageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    china, flower = (Image.fromarray(photo) for photo in load_sample_images().images)
    return [
        china,  # 640 x 427
        flower.crop((100, 0, 401, 427)),  # odd, upright
        china.crop((7, 3, 90, 86)),  # square, smaller than the models' inputs
        flower.crop((0, 100, 600, 133)),  # a strip
        china.crop((10, 10, 12, 47)),
    ]


@pytest.mark.parametrize("size", [48, 223, 336])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_crop_is_bit_equal_to_the_hugging_face_clip_processor(photographs, size, resample):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample={"bicubic": 3, "bilinear": 2}[resample],
    )
    transform = ImageTransform(size, "crop", resample, CLIP_MEAN, CLIP_STD)
    for photograph in photographs:
        expected = processor(photograph, return_tensors="np")["pixel_values"][0]
        pixels = transform(encode(photograph))
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, expected)


def test_pad_is_bit_equal_to_llava_padding_and_the_clip_processor(photographs):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    transform = ImageTransform(64, "pad", "bicubic", CLIP_MEAN, CLIP_STD)
    for photograph in photographs:
        width, height = photograph.size
        padded = Image.new("RGB", (max(photograph.size),) * 2, (122, 116, 104))
        padded.paste(photograph, (max(0, height - width) // 2, max(0, width - height) // 2))
        expected = processor(padded, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(transform(encode(photograph)), expected)


def test_longest_side_is_bit_equal_to_the_sam_processor(photographs):
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    processor = SamImageProcessorPil(
        size={"longest_edge": 128}, pad_size={"height": 128, "width": 128}
    )
    transform = ImageTransform(
        128, "longest_side", "bilinear", tuple(processor.image_mean), tuple(processor.image_std)
    )
    for photograph in photographs:
        expected = processor(photograph, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(transform(encode(photograph)), expected)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    size=st.integers(1, 50),
    geometry=st.sampled_from(["crop", "pad", "stretch", "longest_side"]),
)
def test_every_shape_becomes_a_square(width, height, size, geometry):
    colour = (200, 30, 90)
    image = Image.new("RGB", (width, height), colour)
    square = apply_geometry(image, size, geometry, fill=tuple(v / 255 for v in colour))
    assert square.size == (size, size)
    assert np.all(np.asarray(square) == colour)  # content and fill have one colour


def test_geometries_keep_the_field_that_they_promise():
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, :20, 0], stripes[:, 20:40, 1], stripes[:, 40:, 2] = 255, 255, 255
    image = Image.fromarray(stripes)
    seen = {
        geometry: np.asarray(apply_geometry(image, 30, geometry, "nearest", (1, 1, 1)))
        for geometry in ("crop", "pad", "stretch", "longest_side")
    }
    assert np.all(seen["crop"] == (0, 255, 0))
    assert np.all(seen["pad"][:10] == 255)
    assert np.all(seen["pad"][20:] == 255)
    np.testing.assert_array_equal(seen["pad"][10:20], seen["longest_side"][:10])
    assert np.all(seen["longest_side"][10:] == 255)
    np.testing.assert_array_equal(seen["stretch"][15], seen["pad"][15])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_plain_files_have_the_pixels_that_llava_sees(photographs, mode, format):
    """LLaVA opens an image and converts it to RGB; docs/reproduce.md lists where that differs."""
    try:
        data = encode(photographs[0].convert(mode), format)
    except (OSError, ValueError):
        pytest.skip(f"{format} holds no {mode}")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation, format):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # a white corner, top left
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    data = encode(stored, format, exif=exif)
    shown = np.asarray(decode_image(data)).astype(int)
    assert shown.shape == upright.shape
    assert np.abs(shown - upright).max() < 60  # JPEG and WebP are lossy
    assert probe_image(data)[1:] == (32, 16)


def test_transparency_lies_over_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.putpixel((0, 0), (255, 0, 0, 255))
    palette = half.quantize(4)
    grey_alpha = Image.new("LA", (4, 4), (0, 0))
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    for data in (
        encode(half),
        encode(palette),
        encode(half, "WEBP", lossless=True),
        encode(grey_alpha),
        encode(keyed, transparency=(1, 2, 3)),
        encode(Image.new("L", (4, 4), 7), transparency=7),
        encode(Image.new("P", (4, 4), 1), "GIF", transparency=1),
    ):
        assert decode_image(data).getpixel((3, 3)) == (255, 255, 255)
    assert decode_image(encode(half)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(format):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    shown = np.asarray(decode_image(encode(Image.fromarray(levels), format)))[..., 0]
    np.testing.assert_array_equal(shown, np.round(levels / 257))


@pytest.mark.parametrize(
    ("image", "format"),
    [
        (Image.new("CMYK", (5, 3), (0, 255, 255, 0)), "JPEG"),
        (Image.new("1", (5, 3), 1), "PNG"),
        (Image.new("L", (5, 3), 9), "BMP"),
        (Image.new("P", (5, 3), 9), "GIF"),
    ],
)
def test_other_modes_become_rgb(image, format):
    decoded = decode_image(encode(image, format))
    assert (decoded.mode, decoded.size) == ("RGB", (5, 3))
    if image.mode == "CMYK":
        red, green, blue = decoded.getpixel((0, 0))
        assert red > 200 > 60 > max(green, blue)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert decode_image(data).getpixel((0, 0))[0] > 200


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_unreadable_and_never_crash(photographs, format):
    data = encode(photographs[1], format)
    assert probe_image(data).extension in ("jpg", "png", "webp", "bmp", "gif", "tiff")
    for share in (0.0, 0.001, 0.01, 0.3, 0.9):
        with pytest.raises(UnreadableImageError, match=r"no image|cannot be decoded"):
            decode_image(data[: int(len(data) * share)])


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
def test_damaged_bytes_give_an_image_or_a_sentence(format, flips):
    data = bytearray(encode(Image.linear_gradient("L").resize((40, 30)).convert("RGB"), format))
    for where, value in flips:
        data[int(where * min(len(data), 200))] = value
    with contextlib.suppress(UnreadableImageError):
        assert decode_image(bytes(data)).mode == "RGB"


def test_decompression_bombs_are_refused_without_a_warning(monkeypatch):
    data = encode(Image.new("RGB", (40, 30)))
    for limit in (1000, 100):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(UnreadableImageError, match=f"more than {limit:,} pixels.*smaller"):
                decode_image(data)
        assert caught == []


def test_long_strips_and_floating_point_pixels_are_refused():
    with pytest.raises(UnreadableImageError, match=r"is 402 x 2 pixels; expected .* 200:1"):
        decode_image(encode(Image.new("RGB", (402, 2))))
    with pytest.raises(UnreadableImageError, match=r"mode F, .* 8-bit RGB"):
        decode_image(encode(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_huge_sides_are_padded_without_a_huge_square(monkeypatch, photographs):
    photograph = photographs[0].crop((0, 0, 640, 320))
    exact = apply_geometry(photograph, 32, "pad", fill=CLIP_MEAN)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 320)
    thrifty = apply_geometry(photograph, 32, "pad", fill=CLIP_MEAN)
    assert np.abs(np.asarray(exact).astype(int) - np.asarray(thrifty)).mean() < 4


def test_warning_filters_survive_decoding_in_many_threads():
    data = encode(Image.new("RGBA", (64, 64)))
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [decode_image(data) for _ in range(30)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
