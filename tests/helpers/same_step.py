"""Compare one optimizer step of packed rows with one of the same samples, each by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from movekd.distill.loss_terms import LossTerm
from movekd.distill.objective import count_units, step_loss
from movekd.train.packed_data import PackedDataset
from movekd.train.sample_count import count_samples

TOLERANCE = 1e-5


def packed(dataset: Any, seed: int = 0) -> PackedDataset:
    """Return the rows of a data set."""
    return PackedDataset(dataset, count_samples(dataset, needs_lengths=True).lengths, seed)


def one_by_one(rows: PackedDataset) -> list[Any]:
    """Return the samples of all rows, in the order in which they stand there."""
    return [rows.conversations[position] for row in rows.rows for position in row]


def step(
    model: Any, batches: Sequence[Mapping[str, Any]]
) -> tuple[list[int], dict[str, float], dict[str, Tensor]]:
    """Return units, terms and gradients of one step, whose micro-batches are the batches."""
    counts = torch.stack([count_units(batch) for batch in batches]).sum(0)
    model.zero_grad()
    sums: dict[str, float] = {}
    for batch in batches:
        terms = model(**{key: value for key, value in batch.items() if key != "keys"})
        step_loss(terms, counts, 1)[0].backward()
        for term in terms:
            if isinstance(term, LossTerm):
                sums[term.name] = sums.get(term.name, 0.0) + term.sum.item()
    learned = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return counts.tolist(), sums, learned


def assert_same_step(
    model: Any, rows: Sequence[Mapping[str, Any]], singles: Sequence[Mapping[str, Any]]
) -> None:
    """Compare counts, every loss term and every gradient of two steps."""
    counts, terms, gradients = step(model, singles)
    packed_counts, packed_terms, packed_gradients = step(model, rows)
    assert packed_counts == counts
    assert packed_terms.keys() == terms.keys()
    for name, expected in terms.items():
        assert packed_terms[name] == pytest.approx(expected, rel=TOLERANCE), name
    assert packed_gradients.keys() == gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, expected in gradients.items():
        error = (packed_gradients[name] - expected).abs().max().item()
        assert error <= TOLERANCE * min(largest, 1), name
