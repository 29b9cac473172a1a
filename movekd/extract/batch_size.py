"""Find the largest batch that fits into the device's memory, for `--batch-size auto`.

The batch size is found before the calibration and sealed with it, because the last bits of a row
depend on the size of its batch.
"""

from collections.abc import Callable

import torch

from movekd.cache.codecs import codec
from movekd.cache.layout import grid_side, teacher_layout
from movekd.cache.stats import ChannelStats
from movekd.errors import CacheError
from movekd.extract.image_loader import PixelBatch, image_transform
from movekd.extract.options import CPU_BATCH_SIZE, BuildOptions
from movekd.extract.shard_buffer import stored_output
from movekd.teachers import Teacher, TeacherOutput

MEMORY_SHARE = 0.9
_HELD_OUTPUTS = 4
"""Batches whose features are on the device at once: one in the teacher, two that wait, and one in
the encoder. ``forward_and_encode`` encodes the last one."""


def largest_batch_size(teacher: Teacher, options: BuildOptions) -> int:
    """Return the largest power of two that fits, at most the rows of a Zarr shard.

    A power of two divides a Zarr shard, so all batches have one shape.

    Raises:
        CacheError: not even one image fits.
    """
    device = torch.device(options.device)
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    spec = teacher.spec
    outputs: list[TeacherOutput] = []

    def peak_bytes(batch_size: int) -> int:
        outputs.clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(_HELD_OUTPUTS):
            outputs.append(forward_and_encode(teacher, batch_size, options))
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)

    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    budget = int(MEMORY_SHARE * total) - others
    try:
        peak_bytes(1)
        num_tokens, width, _, _ = outputs[0].shape
        side = grid_side(num_tokens) if spec.grid == "native" else spec.grid
        layout = teacher_layout(spec.codec, side**2, width, cls_width=None, num_heads=None)
        return largest_power_of_two(peak_bytes, budget, layout.rows_per_shard)
    except torch.OutOfMemoryError:
        raise CacheError(
            f"teacher '{spec.name}' does not fit {options.device}, which has {free / 1e9:.1f} GB "
            "free, even with one image; free it, or use --dtype bfloat16."
        ) from None
    finally:
        outputs.clear()
        torch.cuda.empty_cache()


def forward_and_encode(teacher: Teacher, batch_size: int, options: BuildOptions) -> TeacherOutput:
    """Run a batch of black images through the teacher and the encoder, as a build does."""
    spec, size = teacher.spec, teacher.spec.image_size
    levels_BHWC = torch.zeros(batch_size, size, size, 3, dtype=torch.uint8)
    transform = image_transform(spec, "crop")
    images = list(range(batch_size))
    batch = PixelBatch(images, levels_BHWC, [(size, size)] * batch_size, {}, transform)
    output = teacher.forward(batch.pixels(options.device, options.dtype))
    kept = stored_output(output, spec)
    width = kept.tokens_BND.shape[-1]
    chosen = codec(spec.codec)
    stats = ChannelStats(torch.zeros(width), torch.ones(width)).for_codec(chosen)
    stats = stats.to(torch.device(options.device))
    chosen.error(kept.tokens_BND, chosen.encode(kept.tokens_BND, stats), stats)
    return output


def largest_power_of_two(peak_bytes: Callable[[int], int], budget: int, limit: int) -> int:
    """Return the largest power of two up to ``limit`` whose peak is within ``budget`` bytes.

    Two small batches give the bytes per image. The size that follows is tried, and halved while it
    does not fit.

    Args:
        peak_bytes: batch size -> bytes that it took; may raise ``torch.OutOfMemoryError``.
        budget: available bytes.
        limit: the largest useful batch size.

    Raises:
        torch.OutOfMemoryError: one image does not fit.
    """
    one = peak_bytes(1)
    if one > budget:
        raise torch.OutOfMemoryError(f"one image takes {one} of {budget} bytes")
    size = 1
    try:
        per_image = max(peak_bytes(2) - one, 1)
        while 2 * size <= limit and one + (2 * size - 1) * per_image <= budget:
            size *= 2
    except torch.OutOfMemoryError:
        return 1
    while size > 1:
        try:
            if peak_bytes(size) <= budget:
                return size
        except torch.OutOfMemoryError:
            pass
        size //= 2
    return 1
