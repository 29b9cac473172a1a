"""Decode an image file to an upright 8-bit RGB image, as an image viewer shows it.

Input: the bytes of the file. Output: a Pillow image, or its size. An image that cannot be decoded,
or must not be, raises ``UnreadableImageError``.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from movekd.errors import UnreadableImageError

MAX_ASPECT_RATIO = 200
"""A longer strip takes gigabytes once its short side is resized to a model's input size."""

FILE_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further pictures behind the first
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tiff",
    "PPM": "ppm",
}
"""Pillow's names of the formats that are read, and the file extension of each in a shard.

The list is explicit because Pillow would pass an EPS file to Ghostscript.
"""

_OPENABLE = tuple(name for name in FILE_EXTENSIONS if name != "MPO")  # Pillow opens it as JPEG
_UPRIGHT = {  # EXIF orientation -> the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageInfo(NamedTuple):
    """File extension, and size in pixels after EXIF rotation."""

    extension: str
    width: int
    height: int


def decode_image(data: bytes) -> Image.Image:
    """Return the image in ``data`` as 8-bit RGB, as an image viewer shows it.

    Applies EXIF orientation, puts transparency over white, scales 16-bit grey to 8 bits, converts
    CMYK, and takes the first frame of an animation.

    Raises:
        UnreadableImageError: not an image, truncated, too large to be decoded safely, or of a
            pixel format without a plain meaning in RGB.
    """
    with _quiet_pillow():
        image = _load(data)
        try:
            return _to_rgb(image)
        except (OSError, ValueError) as error:
            raise UnreadableImageError(
                f"the image's pixels, mode {image.mode}, have no plain meaning in RGB ({error}); "
                "save the image as 8-bit RGB."
            ) from None


def probe_image(data: bytes) -> ImageInfo:
    """Return format and size of the image in ``data``; decodes all of it to find damage.

    Raises:
        UnreadableImageError: as ``decode_image``.
    """
    with _quiet_pillow():
        opened = _open(data)
        extension = FILE_EXTENSIONS[str(opened.format)]
    image = decode_image(data)
    return ImageInfo(extension, image.width, image.height)


def _open(data: bytes) -> Image.Image:
    """Return the image of ``data`` with its header read."""
    try:
        return Image.open(io.BytesIO(data), formats=_OPENABLE)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImageError(
            f"the image has more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels, Pillow's limit "
            "against decompression bombs; make it smaller."
        ) from None
    except UnidentifiedImageError:
        known = ", ".join(sorted(set(FILE_EXTENSIONS.values())))
        raise UnreadableImageError(
            f"{len(data)} bytes are no image that can be read; expected one of {known}."
        ) from None
    except Exception as error:  # a damaged header makes Pillow's parsers raise anything
        raise _unreadable(error) from None


def _load(data: bytes) -> Image.Image:
    """Return the first frame of ``data``, decoded and upright."""
    image = _open(data)
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise UnreadableImageError(
            f"the image is {image.width} x {image.height} pixels; expected sides of at most "
            f"{MAX_ASPECT_RATIO}:1. Cut it into pieces."
        )
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise anything, too
        raise _unreadable(error) from None
    try:
        # Read after load: Pillow rotates a TIFF itself and drops the tag; a PNG may end with it.
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data; a viewer shows the image all the same
        orientation = 1
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _unreadable(error: Exception) -> UnreadableImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UnreadableImageError(f"the image cannot be decoded ({reason}); replace the file.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "FI":  # mode I holds the 16 bits of a PGM, or 32 bits
        levels_HW = np.asarray(image)
        if image.mode == "F" or levels_HW.min() < 0 or levels_HW.max() > 65535:
            raise ValueError("32 bits per pixel, of a range that the file does not say")
        grey = Image.fromarray(((levels_HW.astype(np.uint32) + 128) // 257).astype(np.uint8))
        return grey.convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_filters = warnings.catch_warnings()


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Make Pillow's bomb warning an error and silence its other warnings, in all threads.

    ``warnings.catch_warnings`` changes global state, so two threads would undo each other's
    filters. Here the first thread to enter sets them and the last one to leave restores them.
    """
    global _quiet_depth, _quiet_filters
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_filters.__exit__(None, None, None)
