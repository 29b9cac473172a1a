"""Turn tokens into colours: the first three principal components of a teacher's features.

Each teacher has one basis, so images can be compared: equal features have equal colours.

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
class PcaBasis:
    """Turns the standardised tokens of one teacher into colours.

    Attributes:
        mean_D: mean, subtracted first.
        axes_D3: the components, largest variance first.
        low_3: value of each component that becomes 0.
        high_3: value of each component that becomes 1.
    """

    mean_D: Tensor
    axes_D3: Tensor
    low_3: Tensor
    high_3: Tensor

    def colours(self, tokens_ND: Tensor) -> npt.NDArray[np.float32]:
        """Return red, green and blue of each token in 0..1, (N, 3); NaN for a NaN token."""
        projected_N3 = (tokens_ND - self.mean_D) @ self.axes_D3
        scaled_N3 = (projected_N3 - self.low_3) / (self.high_3 - self.low_3).clamp(min=1e-12)
        return np.asarray(scaled_N3.clamp(0, 1).numpy(), np.float32)


def fit_basis(tokens_ND: Tensor) -> PcaBasis:
    """Return the basis of a sample of standardised tokens, deterministically."""
    sample_ND = tokens_ND[~tokens_ND.isnan().any(-1)].float()
    sample_ND = sample_ND[:: -(-len(sample_ND) // _MOST_TOKENS) or 1]
    mean_D = sample_ND.mean(0)
    centred_ND = sample_ND - mean_D
    if min(centred_ND.shape) < 3:
        raise CacheError(
            f"{len(sample_ND)} tokens of {sample_ND.shape[1]} channels are too few for "
            "three principal components; expected at least 3 of each."
        )
    with seeded(0):  # pca_lowrank starts from a random matrix
        _, _, axes_DQ = torch.pca_lowrank(centred_ND, q=min(6, *centred_ND.shape), center=False)
    axes_D3 = axes_DQ[:, :3]
    largest = axes_D3.abs().argmax(0)
    axes_D3 = axes_D3 * axes_D3[largest, torch.arange(3)].sign()  # PCA leaves the sign open
    projected_N3 = centred_ND @ axes_D3
    low_3, high_3 = torch.quantile(projected_N3, torch.tensor([_LOW, _HIGH]), dim=0)
    return PcaBasis(mean_D, axes_D3, low_3, high_3)


def fit_teacher_basis(store: TeacherCache, catalog: Catalog) -> PcaBasis:
    """Return a teacher's basis, from rows spread evenly over its built rows.

    Raises:
        CacheError: nothing is built yet.
    """
    rows = readable_rows(store, catalog)
    if not len(rows):
        raise CacheError(
            f"nothing of teacher '{store.teacher}' in {store.storage.url} is built yet; run "
            "`movekd cache build`, or wait for it."
        )
    chosen = rows[np.linspace(0, len(rows) - 1, min(NUM_BASIS_ROWS, len(rows))).astype(np.int64)]
    return fit_basis(store.read(chosen).standardised_BND.flatten(0, 1))


def readable_rows(store: TeacherCache, catalog: Catalog) -> npt.NDArray[np.int64]:
    """Return the rows with features of this teacher: built and not skipped."""
    rows = catalog.rows
    missing = np.isin(rows // store.layout.rows_per_shard, store.missing_shards)
    skipped = np.isin(rows, np.array(list(store.skipped), np.int64))
    return np.asarray(rows[~missing & ~skipped], np.int64)
