import numpy as np
import pytest
import torch
from torch import Tensor

from movekd.distill import released_sam_tokens
from movekd.errors import ConfigError


def spelled_out(tokens_NC: Tensor) -> Tensor:
    """The steps of the released code, on the map of one image."""
    feature = tokens_NC.T.reshape(256, 64, 64)
    rows = feature.reshape(16384, 64)
    columns = rows.transpose(0, 1).reshape(64, 128, 128)
    unshuffled = torch.nn.functional.pixel_unshuffle(columns, 2)
    assert unshuffled.shape == (256, 64, 64)
    return unshuffled.reshape(256, 4096).T


def test_it_is_what_the_released_code_does() -> None:
    tokens = torch.randn(2, 4096, 256, generator=torch.Generator().manual_seed(0))
    found = released_sam_tokens(tokens)
    assert found.shape == tokens.shape
    for one, given in zip(found, tokens, strict=True):
        assert torch.equal(one, spelled_out(given))


def test_each_value_by_its_place() -> None:
    """A column of the image becomes four channels, its (channel, row) pairs a map of 128 x 128."""
    values = torch.arange(4096 * 256).reshape(1, 4096, 256)
    found = released_sam_tokens(values)[0].numpy().reshape(64, 64, 256)
    y, x, channel = np.meshgrid(np.arange(64), np.arange(64), np.arange(256), indexing="ij")
    column, (dy, dx) = channel // 4, np.divmod(channel % 4, 2)
    row = (2 * y + dy) * 128 + 2 * x + dx  # of the 16384: 64 rows a channel
    from_channel, from_y = np.divmod(row, 64)
    np.testing.assert_array_equal(found, (from_y * 64 + column) * 256 + from_channel)


@pytest.mark.parametrize(("side", "factor"), [(2, 1), (4, 2), (2, 3)])
def test_it_moves_every_value_once_and_gradients_with_them(side: int, factor: int) -> None:
    channels = factor**2 * side
    tokens = torch.randn(3, side**2, channels, dtype=torch.float64, requires_grad=True)
    found = released_sam_tokens(tokens)
    assert torch.equal(found.flatten(1).sort().values, tokens.flatten(1).sort().values)
    (gradient,) = torch.autograd.grad((found * found.detach()).sum(), tokens)
    assert torch.equal(gradient, tokens)


@pytest.mark.parametrize("shape", [(576, 256), (4095, 256), (4096, 1024 + 64), (64, 16)])
def test_another_grid_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"4096 tokens of 256 .*found {shape[0]} tokens of"):
        released_sam_tokens(torch.zeros(1, *shape))
