"""EVA-02-L as a detection backbone: a vision transformer with windows and a rotary embedding.

Input: normalised pixels; the patch size must divide their height and width. Output: the tokens of
the last block. No library has this network, so ``provider: movekd`` builds it here.

Module names are those of the released checkpoint, so that it loads without renaming.

Legend: B batch, C channels, R rows, S columns of the patch grid, N = R x S tokens, D width,
H heads, K width of a head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, shorten
from movekd.teachers.backbone import Backbone, check_name
from movekd.teachers.checkpoints import (
    Published,
    load_exactly,
    read_state_dict,
    tensors_below,
    weights_file,
)

RELEASED = Published("Yuxin-CV/EVA-02", ("eva02/det/eva02_L_coco_det_sys_o365.pth",))


def eva02_det_backbone(spec: CacheSpec) -> Backbone:
    """Build ``model: eva02_det`` with its weights."""
    check_name(spec, ["eva02_det"])
    try:
        module = Eva02Det(**spec.model_args)
    except TypeError as error:
        raise ConfigError(
            f"model_args of '{spec.name}' make no eva02_det: {shorten(error)}. Correct them."
        ) from None
    if spec.weights != "random":
        path = weights_file(spec, RELEASED)
        load_exactly(module, backbone_weights(read_state_dict(path)), path)
    return Backbone(module, module.forward, blocks=tuple(module.blocks))


def backbone_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors of a detector's state dict, under the names of ``Eva02Det``.

    The stored tables of the rotary embedding are dropped; ``rotary_table`` computes them.
    """
    inside = tensors_below("backbone.net.", state)
    return {n: t for n, t in inside.items() if not n.endswith((".freqs_cos", ".freqs_sin"))}


def rotary_table(
    num_rows: int,
    num_cols: int,
    base_grid: int,
    head_dim: int,
    device: torch.device | None = None,
) -> Tensor:
    """Return the rotation angles of a patch grid, (N, K / 2), float32, row-major.

    The first half of the angles turns with the row, the second with the column. Position i of n
    counts as ``i / n * base_grid``: a larger grid interpolates the positions of pre-training.

    Source: EVA-02 (arXiv 2303.11331), 2-D rotary position embedding with theta 10000.
    """
    num_freqs = head_dim // 4
    # Made on the device: a copy from the CPU would wait for all work that is queued there.
    kind: Any = {"dtype": torch.float32, "device": device}
    freqs = 10000.0 ** (-torch.arange(num_freqs, **kind) / num_freqs)
    rows = torch.arange(num_rows, **kind) / num_rows * base_grid
    cols = torch.arange(num_cols, **kind) / num_cols * base_grid
    angles_R1F = (rows[:, None] * freqs)[:, None].expand(-1, num_cols, -1)
    angles_1SF = (cols[:, None] * freqs)[None].expand(num_rows, -1, -1)
    return torch.cat((angles_R1F, angles_1SF), dim=-1).flatten(0, 1)


def rotate(x_BHNK: Tensor, angles: Tensor) -> Tensor:
    """Return ``x_BHNK`` with channels (2 j, 2 j + 1) turned by ``angles[n, j]``.

    The rotation runs in float32 whatever the dtype of ``x_BHNK``, which the result has too.
    """
    even, odd = x_BHNK.float().view(*x_BHNK.shape[:-1], -1, 2).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x_BHNK.dtype)


class Attention(nn.Module):
    """Self-attention with a bias for queries and values, but none for keys."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens_BND: Tensor, angles: Tensor) -> Tensor:
        """Return (B, N, D); every token attends to all tokens of its row of the batch."""
        batch, num_tokens, _ = tokens_BND.shape
        q, k, v = (
            projected.view(batch, num_tokens, self.num_heads, -1).transpose(1, 2)
            for projected in (
                functional.linear(tokens_BND, self.q_proj.weight, self.q_bias),
                self.k_proj(tokens_BND),
                functional.linear(tokens_BND, self.v_proj.weight, self.v_bias),
            )
        )
        mixed_BHNK = functional.scaled_dot_product_attention(
            rotate(q, angles), rotate(k, angles), v
        )
        out: Tensor = self.proj(mixed_BHNK.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """The gated MLP ``w3(ffn_ln(SiLU(w1 x) * w2 x))``."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(embed_dim, hidden_dim)
        self.w2 = nn.Linear(embed_dim, hidden_dim)
        self.ffn_ln = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.w3 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        out: Tensor = self.w3(self.ffn_ln(functional.silu(self.w1(x)) * self.w2(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block over a (B, R, S, D) grid, in windows or over the whole grid."""

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size  # 0: the whole grid
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = SwiGLU(embed_dim, hidden_dim)

    def forward(self, x_BRSD: Tensor, angles: Tensor) -> Tensor:
        """Return (B, R, S, D). ``angles`` belong to one window, or to the whole grid."""
        normed = self.norm1(x_BRSD)
        if self.window_size:
            windows, padded = partition(normed, self.window_size)
            attended = unpartition(self.attn(windows, angles), padded, x_BRSD.shape)
        else:
            attended = self.attn(normed.flatten(1, 2), angles).view(x_BRSD.shape)
        x_BRSD = x_BRSD + attended
        out: Tensor = x_BRSD + self.mlp(self.norm2(x_BRSD))
        return out


def partition(x_BRSD: Tensor, window_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut a grid into windows, zeros added below and to the right where it does not divide.

    The zeros are attended to like any token, as in ViTDet, whose released weights saw them.

    Returns:
        Windows (B x windows, window_size^2, D) and the padded (rows, columns).
    """
    side = window_size
    x_BRSD = functional.pad(x_BRSD, (0, 0, 0, -x_BRSD.shape[2] % side, 0, -x_BRSD.shape[1] % side))
    batch, rows, cols, width = x_BRSD.shape
    cells = x_BRSD.view(batch, rows // side, side, cols // side, side, width).transpose(2, 3)
    return cells.reshape(-1, side * side, width), (rows, cols)


def unpartition(windows: Tensor, padded: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Put windows back to a (B, R, S, D) grid of ``shape``; the inverse of ``partition``."""
    batch, rows, cols, width = shape
    side = math.isqrt(windows.shape[1])
    grid = windows.view(batch, padded[0] // side, padded[1] // side, side, side, width)
    return grid.transpose(2, 3).reshape(batch, *padded, width)[:, :rows, :cols]


class Eva02Det(nn.Module):
    """EVA-02 as a detection backbone; the defaults are EVA-02-L (304 M parameters).

    Args:
        embed_dim: D.
        depth: number of blocks.
        num_heads: H; D / H must divide by 4 for the two axes of the rotary pairs.
        patch_size: side of a patch in pixels.
        window_size: side of a window in patches.
        global_blocks: blocks that attend over the whole grid; the others use windows.
        mlp_ratio: hidden width of the MLP over D, rounded down.
        base_grid: grid side that the rotary embedding was pre-trained on.
        pretrain_grid: grid side of the stored absolute position embedding.

    Source: EVA-02 (arXiv 2303.11331) and its released detection code, Yuxin-CV/EVA-02.
    """

    def __init__(
        self,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        patch_size: int = 16,
        window_size: int = 16,
        global_blocks: Sequence[int] = (2, 5, 8, 11, 14, 17, 20, 23),
        mlp_ratio: float = 8 / 3,
        base_grid: int = 16,
        pretrain_grid: int = 14,
    ) -> None:
        super().__init__()
        self.window_size, self.base_grid = window_size, base_grid
        self.global_blocks = frozenset(global_blocks)
        self.head_dim = embed_dim // num_heads
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)}
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + pretrain_grid**2, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                int(embed_dim * mlp_ratio),
                window_size=0 if index in global_blocks else window_size,
            )
            for index in range(depth)
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the last block's output, (B, D, R, S), without a final norm."""
        x_BRSD = self.patch_embed["proj"](pixels_BCHW).permute(0, 2, 3, 1)
        rows, cols = x_BRSD.shape[1:3]
        x_BRSD = x_BRSD + self._positions(rows, cols)
        side = self.window_size
        device = x_BRSD.device
        whole = rotary_table(rows, cols, self.base_grid, self.head_dim, device)
        window = rotary_table(side, side, self.base_grid, self.head_dim, device)
        for index, block in enumerate(self.blocks):
            x_BRSD = block(x_BRSD, whole if index in self.global_blocks else window)
        out_BDRS: Tensor = x_BRSD.permute(0, 3, 1, 2)
        return out_BDRS

    def _positions(self, rows: int, cols: int) -> Tensor:
        """Return the absolute position embedding (1, R, S, D), resized bicubically."""
        stored_1ND = self.pos_embed[:, 1:]  # entry 0 is for a [CLS] token, which this network lacks
        side = math.isqrt(stored_1ND.shape[1])
        stored = stored_1ND.view(1, side, side, -1).permute(0, 3, 1, 2)
        if (rows, cols) != (side, side):
            stored = functional.interpolate(
                stored, size=(rows, cols), mode="bicubic", align_corners=False
            )
        return stored.permute(0, 2, 3, 1)
