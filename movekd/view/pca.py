"""Tokens as colours: three principal components of a teacher's features, one basis a teacher.

Two images in the same basis can be compared: equal features have equal colours.

Legend: R rows, N tokens, D channels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.cache.catalog import Catalog
from movekd.cache.reader import TeacherCache
from movekd.errors import CacheError
from movekd.seeding import seeded

NUM_BASIS_ROWS = 32
_MOST_TOKENS = 8192
_LOW, _HIGH = 0.02, 0.98  # quantiles that become 0 and 1


@dataclass(frozen=True)
class ColourBasis:
    """Turns the standardised tokens of one teacher into colours.

    Attributes:
        mean_D: subtracted first.
        axes_D3: the components, largest variance first.
        low_3: what becomes 0 of each component.
        high_3: what becomes 1.
    """

    mean_D: Tensor
    axes_D3: Tensor
    low_3: Tensor
    high_3: Tensor

    def colours(self, tokens_ND: Tensor) -> npt.NDArray[np.float32]:
        """Return red, green and blue of each token in 0..1, (N, 3); NaN where a token is NaN."""
        projected_N3 = (tokens_ND - self.mean_D) @ self.axes_D3
        scaled_N3 = (projected_N3 - self.low_3) / (self.high_3 - self.low_3).clamp(min=1e-12)
        return np.asarray(scaled_N3.clamp(0, 1).numpy(), np.float32)


def fit_basis(tokens_ND: Tensor) -> ColourBasis:
    """Return the basis of a sample of standardised tokens; the same sample gives the same one."""
    sample_ND = tokens_ND[~tokens_ND.isnan().any(-1)].float()
    sample_ND = sample_ND[:: -(-len(sample_ND) // _MOST_TOKENS) or 1]
    mean_D = sample_ND.mean(0)
    centred_ND = sample_ND - mean_D
    if min(centred_ND.shape) < 3:
        raise CacheError(
            f"{len(sample_ND)} tokens of {sample_ND.shape[1]} channels have no three principal "
            "components; expected at least 3 of each."
        )
    with seeded(0):  # the method draws a start
        _, _, axes_DQ = torch.pca_lowrank(centred_ND, q=min(6, *centred_ND.shape), center=False)
    axes_D3 = axes_DQ[:, :3]
    largest = axes_D3.abs().argmax(0)
    axes_D3 = axes_D3 * axes_D3[largest, torch.arange(3)].sign()  # a component has no direction
    projected_N3 = centred_ND @ axes_D3
    low_3, high_3 = torch.quantile(projected_N3, torch.tensor([_LOW, _HIGH]), dim=0)
    return ColourBasis(mean_D, axes_D3, low_3, high_3)


def basis_of(store: TeacherCache, catalog: Catalog) -> ColourBasis:
    """Return a teacher's basis, from rows spread evenly over what is built of it.

    Raises:
        CacheError: nothing is built yet.
    """
    rows = readable_rows(store, catalog)
    if not len(rows):
        raise CacheError(
            f"nothing of teacher '{store.teacher}' in {store.storage.url} is built yet; wait for "
            "its `movekd cache build`, or run it."
        )
    chosen = rows[np.linspace(0, len(rows) - 1, min(NUM_BASIS_ROWS, len(rows))).astype(np.int64)]
    return fit_basis(store.read(chosen).standardised_BND.flatten(0, 1))


def readable_rows(store: TeacherCache, catalog: Catalog) -> npt.NDArray[np.int64]:
    """Return the rows that have features of this teacher: built, and not skipped."""
    rows = catalog.rows
    missing = np.isin(rows // store.layout.rows_per_shard, store.missing_shards)
    skipped = np.isin(rows, np.array(list(store.skipped), np.int64))
    return np.asarray(rows[~missing & ~skipped], np.int64)
