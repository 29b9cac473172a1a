"""Turn the bytes of an image file into a model's input: normalised square pixels.

Input: bytes from a shard or from a user's file. Output: float32 (3, S, S). Extraction, training and
evaluation hold one ``ImageTransform`` per model. It applies the same rule to the original pixels at
the model's own size, so that all models see the same part of the image.

Dimensions: B images, C channels (3, RGB), H height, W width, S side of the square, V views.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from movekd.corpus.anyres import Views, anyres_canvas, cut_tile, num_views
from movekd.corpus.decode import decode_image
from movekd.errors import UnreadableImageError

Geometry = Literal["crop", "pad", "stretch", "longest_side"]
"""How an image of any shape becomes a square.

crop: short side to the model's size, then the centre. pad: to a square with the fill colour,
then to size. stretch: both sides to size. longest_side: long side to size, the fill colour to
the right and below (SAM's own rule).
"""

Resample = Literal["bicubic", "bilinear", "lanczos", "nearest"]
"""Pillow's filters."""

Colour = tuple[float, float, float]
"""Red, green, blue in 0..1."""

_FILTERS: dict[Resample, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


class Square(NamedTuple):
    """An image at a model's size, before normalisation.

    Attributes:
        levels_HWC: uint8 (S, S, 3).
        width: columns that show the image, from the left. The rest is padding that is added after
            the normalisation (only with ``longest_side``).
        height: rows that show the image, from the top.
    """

    levels_HWC: NDArray[np.uint8]
    width: int
    height: int


class SeenImage(NamedTuple):
    """All views of an image as a model's input.

    Attributes:
        pixels_VCHW: float32, normalised: the base view, then the tiles.
        width: width of the image in pixels, after EXIF rotation.
        height: height of the image in pixels.
    """

    pixels_VCHW: NDArray[np.float32]
    width: int
    height: int


@dataclass(frozen=True)
class ImageTransform:
    """Turn image bytes into the input of one model.

    ``crop`` is bit-equal to the PIL-backed Hugging Face CLIP processor, ``pad`` to LLaVA's
    padding followed by it, ``longest_side`` to the PIL-backed SAM processor, ``stretch`` and the
    tiles, at 336 pixels, to the PIL-backed LLaVA-NeXT processor.

    Attributes:
        image_size: side S in pixels.
        geometry: how the whole image becomes a square; tiles are squares already.
        resample: Pillow filter.
        mean: channel means, of pixels in 0..1.
        std: channel standard deviations.
        fill: padding colour in 0..1. Default: the mean. Tiles are padded with black.
    """

    image_size: int
    geometry: Geometry
    resample: Resample
    mean: Colour
    std: Colour
    fill: Colour | None = None

    def __call__(self, data: bytes, view: int = 0) -> NDArray[np.float32]:
        """Return one view of ``data`` as float32 pixels (3, S, S), normalised.

        Raises:
            UnreadableImageError: ``data`` is not an image that can be decoded, or has no such view.
        """
        return self._normalise(ImageViews(self, decode_image(data)).square(view))

    def see(self, data: bytes, views: Views) -> SeenImage:
        """Return all ``views`` of ``data``, decoded once, and its size.

        Raises:
            UnreadableImageError: ``data`` is not an image that can be decoded.
        """
        image = decode_image(data)
        squares, count = ImageViews(self, image), num_views([image.width], [image.height], views)
        pixels = [self._normalise(squares.square(view)) for view in range(int(count[0]))]
        return SeenImage(np.stack(pixels), image.width, image.height)

    def _normalise(self, square: Square) -> NDArray[np.float32]:
        table = self.normalisation_table
        pixels_CHW = np.empty((3, self.image_size, self.image_size), np.float32)
        for channel in range(3):
            levels_HW = square.levels_HWC[..., channel]
            np.take(table[channel], levels_HW, out=pixels_CHW[channel], mode="clip")
        pixels_CHW[:, square.height :, :] = self.padding_C[:, None, None]
        pixels_CHW[:, :, square.width :] = self.padding_C[:, None, None]
        return pixels_CHW

    @property
    def padding_colour(self) -> Colour:
        """Red, green, blue in 0..1."""
        return self.mean if self.fill is None else self.fill

    @cached_property
    def normalisation_table(self) -> NDArray[np.float32]:
        """The model's input for each channel and each of the 256 levels, float32 (3, 256).

        Order of operations and dtypes are those of the Hugging Face processors: bit-equal results.
        """
        levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        centred = levels[None, :] - np.array(self.mean, np.float32)[:, None]
        return np.asarray(centred / np.array(self.std, np.float32)[:, None], np.float32)

    @property
    def padding_C(self) -> NDArray[np.float32]:
        """The model's input where ``longest_side`` pads, float32 (3,).

        SAM pads after normalising, so its padding never sees the rounding to 8 bits.
        """
        mean_C, std_C = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return np.asarray((np.array(self.padding_colour, np.float32) - mean_C) / std_C, np.float32)


class ImageViews:
    """The views of one decoded image as squares of one model's size.

    Args:
        transform: the model's transform.
        image: RGB, upright.
    """

    def __init__(self, transform: ImageTransform, image: Image.Image) -> None:
        self._transform, self._image = transform, image

    def square(self, view: int = 0) -> Square:
        """Return one view as a uint8 square, before normalisation.

        Raises:
            UnreadableImageError: the image has no such view.
        """
        transform, size = self._transform, self._transform.image_size
        if view:
            width, height = self._image.size
            count = int(num_views([width], [height])[0])
            if not 0 <= view < count:
                raise UnreadableImageError(
                    f"view {view} was asked for, but the image is {width} x {height} pixels and "
                    f"has the views 0 to {count - 1}; the index gives another size. Pack it again."
                )
            return Square(np.asarray(cut_tile(self._canvas, size, view)), size, size)
        square = apply_geometry(
            self._image, size, transform.geometry, transform.resample, transform.padding_colour
        )
        width, height = size, size
        if transform.geometry == "longest_side":
            width, height = _fit(self._image.size, size)
        return Square(np.asarray(square), width, height)

    @cached_property
    def _canvas(self) -> Image.Image:
        transform = self._transform
        return anyres_canvas(self._image, transform.image_size, _FILTERS[transform.resample])


def apply_geometry(
    image: Image.Image,
    size: int,
    geometry: Geometry,
    resample: Resample = "bicubic",
    fill: Colour = (0.0, 0.0, 0.0),
) -> Image.Image:
    """Return an RGB image as a ``size`` x ``size`` square.

    The fill colour is cut to 8 bits as in LLaVA: ``int(value * 255)``.

    Source: crop, transformers image_transforms.py (get_resize_output_image_size, center_crop);
    pad, haotian-liu/LLaVA llava/mm_utils.py (expand2square); longest_side,
    facebookresearch/segment-anything utils/transforms.py (ResizeLongestSide).
    """
    kernel = _FILTERS[resample]
    if geometry == "stretch":
        return image.resize((size, size), kernel)
    if geometry == "crop":
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), kernel)
        return resized.crop((left, top, left + size, top + size))
    red, green, blue = (int(value * 255 + 1e-9) for value in fill)  # 1e-9: 100/255 stays 100
    if geometry == "longest_side":
        square = Image.new("RGB", (size, size), (red, green, blue))
        square.paste(image.resize(_fit(image.size, size), kernel), (0, 0))
        return square
    if Image.MAX_IMAGE_PIXELS and max(image.size) ** 2 > Image.MAX_IMAGE_PIXELS:
        image = image.resize(_fit(image.size, size), kernel)  # the padded image takes gigabytes
    side = max(image.size)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), kernel)


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return width and height scaled so that the longer one is ``side``."""
    scale = side / max(size)
    width, height = (max(1, int(length * scale + 0.5)) for length in size)
    return width, height
