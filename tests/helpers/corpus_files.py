"""Image files and LLaVA entries for tests that pack a corpus."""

import io
from typing import Any

import numpy as np
from PIL import Image


def picture(
    seed: int, size: tuple[int, int] = (12, 9), format: str = "PNG", **options: Any
) -> bytes:
    """Return an image file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def entry(
    identity: str, image: Any = None, question: str = "<image>\nWhat?", **more: Any
) -> dict[str, Any]:
    """Return a LLaVA entry of one question and its answer."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "This."}]
    return {
        "id": identity,
        **({} if image is None else {"image": image}),
        "conversations": turns,
        **more,
    }
