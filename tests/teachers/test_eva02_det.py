"""EVA-02's detection backbone against its equations, written out plainly."""

import cmath
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from movekd.errors import WeightsError
from movekd.teachers.checkpoints import load_exactly, read_state_dict
from movekd.teachers.eva02_det import (
    Block,
    Eva02Det,
    backbone_weights,
    partition,
    rotary_table,
    rotate,
    unpartition,
)

SMALL = {"embed_dim": 16, "num_heads": 2, "patch_size": 4, "window_size": 3, "pretrain_grid": 3}


def small(depth: int = 2) -> Eva02Det:
    torch.manual_seed(0)
    model = Eva02Det(depth=depth, global_blocks=(1,), base_grid=4, **SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def plain_rotation(x: Tensor, num_rows: int, num_cols: int, base_grid: int) -> Tensor:
    """Turn (N, K) one complex number at a time."""
    num_tokens, head_dim = x.shape
    out = x.clone()
    for token in range(num_tokens):
        row, col = divmod(token, num_cols)
        for half, place in enumerate((row / num_rows, col / num_cols)):
            for j in range(head_dim // 4):
                angle = place * base_grid * 10000 ** (-2 * j / (head_dim // 2))
                at = half * head_dim // 2 + 2 * j
                turned = complex(x[token, at], x[token, at + 1]) * cmath.exp(1j * angle)
                out[token, at], out[token, at + 1] = turned.real, turned.imag
    return out


@pytest.mark.parametrize(("rows", "cols", "base_grid"), [(4, 4, 16), (3, 5, 4), (8, 8, 4)])
def test_rotary_embedding_equals_complex_multiplication(
    rows: int, cols: int, base_grid: int
) -> None:
    x = torch.randn(2, 3, rows * cols, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary_table(rows, cols, base_grid, head_dim=16))
    plain = plain_rotation(x[1, 2], rows, cols, base_grid)
    torch.testing.assert_close(turned[1, 2], plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_a_larger_grid_interpolates_the_positions_of_the_smaller() -> None:
    small_grid = rotary_table(4, 4, 16, 8).view(4, 4, -1)
    large_grid = rotary_table(8, 8, 16, 8).view(8, 8, -1)
    torch.testing.assert_close(large_grid[::2, ::2], small_grid)


@given(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4)
)
def test_windows_are_put_back_where_they_came_from(
    batch: int, rows: int, cols: int, width: int, side: int
) -> None:
    grid = torch.arange(float(batch * rows * cols * width)).view(batch, rows, cols, width)
    windows, padded = partition(grid, side)
    assert padded == (math.ceil(rows / side) * side, math.ceil(cols / side) * side)
    assert windows.shape == (batch * padded[0] * padded[1] // side**2, side**2, width)
    assert windows.sum() == grid.sum()
    assert torch.equal(unpartition(windows, padded, grid.shape), grid)


@pytest.mark.parametrize(("rows", "cols"), [(6, 6), (3, 3), (5, 4)])
def test_windowed_block_equals_masked_attention_over_the_whole_grid(rows: int, cols: int) -> None:
    """Also where the grid does not divide: zeros stand below and to the right, attended to."""
    side, num_heads = 3, 2
    torch.manual_seed(1)
    block = Block(16, num_heads, hidden_dim=24, window_size=side).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4)
    attn, mlp = block.attn, block.mlp
    x = torch.randn(1, rows, cols, 16)
    table = rotary_table(side, side, 16, head_dim=8)

    full_rows, full_cols = -(-rows // side) * side, -(-cols // side) * side
    normed = torch.zeros(full_rows, full_cols, 16)
    normed[:rows, :cols] = functional.layer_norm(
        x[0], (16,), block.norm1.weight, block.norm1.bias, 1e-6
    )
    tokens = normed.view(-1, 16)
    place = [divmod(n, full_cols) for n in range(len(tokens))]
    window = torch.tensor([(r // side) * full_cols + c // side for r, c in place])
    angles = torch.stack([table[(r % side) * side + c % side] for r, c in place])
    apart = window[:, None] != window[None]
    heads = []
    for head in range(num_heads):
        part = slice(8 * head, 8 * head + 8)
        q = tokens @ attn.q_proj.weight[part].T + attn.q_bias[part]
        k = tokens @ attn.k_proj.weight[part].T
        v = tokens @ attn.v_proj.weight[part].T + attn.v_bias[part]
        scores = rotate(q, angles) @ rotate(k, angles).T / math.sqrt(8)
        heads.append(scores.masked_fill(apart, -math.inf).softmax(dim=-1) @ v)
    attended = attn.proj(torch.cat(heads, dim=-1)).view(full_rows, full_cols, 16)
    y = x + attended[None, :rows, :cols]
    normed_2 = block.norm2(y)
    gated = functional.silu(mlp.w1(normed_2)) * mlp.w2(normed_2)
    expected = y + mlp.w3(
        functional.layer_norm(gated, (24,), mlp.ffn_ln.weight, mlp.ffn_ln.bias, 1e-6)
    )

    torch.testing.assert_close(block(x, table), expected, atol=1e-5, rtol=1e-5)


def test_only_global_blocks_look_beyond_their_window() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 24, 24)
    changed = pixels.clone()
    changed[..., -1, -1] += 1.0  # in the last window of the 6x6 grid
    for depth, is_reached in ((1, False), (2, True)):  # block 0 has windows, block 1 has none
        model = small(depth)
        with torch.no_grad():
            difference = (model(pixels) - model(changed)).abs().amax(dim=1)[0]
        assert difference[3:, 3:].min() > 0
        assert bool(difference[:3, :3].max() > 0) == is_reached


def test_position_embedding_is_kept_on_its_own_grid_and_resized_on_another() -> None:
    model = small()
    stored = model.pos_embed[:, 1:].view(1, 3, 3, 16)
    torch.testing.assert_close(model._positions(3, 3), stored)
    resized = functional.interpolate(
        stored.permute(0, 3, 1, 2), size=(7, 7), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(model._positions(7, 7), resized.permute(0, 2, 3, 1))


def released(model: Eva02Det) -> dict[str, Tensor]:
    """Return a detector's state dict as it is released: other parts and rotary tables in it."""
    state = {f"backbone.net.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("rope_win", "rope_glb", "blocks.0.attn.rope"):
        state[f"backbone.net.{name}.freqs_cos"] = torch.ones(9, 8)
        state[f"backbone.net.{name}.freqs_sin"] = torch.ones(9, 8)
    return state | {
        "backbone.simfp_2.0.weight": torch.ones(2),
        "roi_heads.mask_head.deconv.bias": torch.ones(2),
    }


def test_released_names_are_those_of_the_paper_s_code() -> None:
    names = {name for name, _ in small(depth=1).named_parameters()}
    pairs = ("norm1", "norm2", "attn.proj", "mlp.w1", "mlp.w2", "mlp.ffn_ln", "mlp.w3")
    attn = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_bias", "v_bias")
    assert names == {
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *(f"blocks.0.{name}.{kind}" for name in pairs for kind in ("weight", "bias")),
        *(f"blocks.0.attn.{name}" for name in attn),
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_backbone_loads_out_of_a_detector(suffix: str, tmp_path: Path) -> None:
    model, path = small(), tmp_path / f"detector{suffix}"
    if suffix == ".pth":
        torch.save({"model": released(model), "iteration": 3}, path)
    else:
        save_file(released(model), path)
    other = Eva02Det(depth=2, global_blocks=(1,), base_grid=4, **SMALL).eval()
    load_exactly(other, backbone_weights(read_state_dict(path)), path)
    pixels = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(model(pixels), other(pixels))


def test_a_detector_of_another_depth_is_refused(tmp_path: Path) -> None:
    for depth, kind in ((1, "Missing"), (3, "Unexpected")):
        state = backbone_weights(released(small(depth)))
        with pytest.raises(WeightsError, match=rf"det.pth does not fit.* {kind} key.*blocks\."):
            load_exactly(small(2), state, tmp_path / "det.pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_a_map_in_the_model_s_dtype(dtype: torch.dtype) -> None:
    pixels = torch.randn(2, 3, 20, 28, dtype=dtype)
    with torch.no_grad():
        out_BDRS = small().to(dtype)(pixels)
    assert out_BDRS.shape == (2, 16, 5, 7)
    assert out_BDRS.dtype == dtype
