import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.distill import balance_loss, choice_share, routing_statistics
from movekd.errors import ConfigError

L, B, N, E = 2, 3, 5, 4


def _routings(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    routings = []
    for _ in range(L):
        probabilities = torch.randn(B, N, E, generator=generator).softmax(-1).requires_grad_()
        choice = torch.nn.functional.one_hot(probabilities.argmax(-1), E).float()
        routings.append((probabilities, choice))
    return routings


def _collapsed(experts: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    one_hot = torch.eye(E)[experts]
    return [(row.expand(B, N, E), row.expand(B, N, E)) for row in one_hot]


def _uniform() -> list[tuple[torch.Tensor, torch.Tensor]]:
    choice = torch.eye(E).repeat(B, 1, 1)  # each expert once a sample
    return [(torch.full((B, E, E), 1 / E), choice)] * L


def test_losses_and_gradients_equal_the_equations_written_with_loops() -> None:
    routings = _routings(0)
    leaves = [p for p, _ in routings]

    sample = torch.tensor(0.0)
    for b in range(B):
        for i in range(E):
            pairs = [(p[b, n, i], c[b, n, i]) for p, c in routings for n in range(N)]
            P = sum(p for p, _ in pairs) / len(pairs)
            F = sum(c for _, c in pairs) / len(pairs)
            sample = sample + P * F / B
    batch = torch.tensor(0.0)
    for p, c in routings:
        for i in range(E):
            P = sum(p[b, n, i] for b in range(B) for n in range(N)) / (B * N)
            F = sum(c[b, n, i] for b in range(B) for n in range(N)) / (B * N)
            batch = batch + E * P * F / L

    for kind, expected in (("sample", sample), ("batch", batch)):
        found = balance_loss(routings, kind)
        torch.testing.assert_close(found, expected)
        for one, two in zip(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(one, two)


def test_uniform_and_collapsed_routers_give_the_stated_values() -> None:
    assert balance_loss(_uniform(), "batch").item() == pytest.approx(1)
    assert balance_loss(_uniform(), "sample").item() == pytest.approx(1 / E)
    assert balance_loss(_collapsed([2, 2]), "batch").item() == pytest.approx(E)
    assert balance_loss(_collapsed([2, 2]), "sample").item() == pytest.approx(1)


def test_layers_that_collapse_onto_different_experts_are_seen_by_batch_alone() -> None:
    assert balance_loss(_collapsed([0, 1]), "batch").item() == pytest.approx(E)
    assert balance_loss(_collapsed([0, 1]), "sample").item() == pytest.approx(0.5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), kind=st.sampled_from(["batch", "sample"]))
def test_order_of_experts_tokens_samples_and_layers_does_not_matter(seed: int, kind: str) -> None:
    routings = _routings(seed)
    loss = balance_loss(routings, kind)
    assert 0 < loss <= (E if kind == "batch" else 1)
    generator = torch.Generator().manual_seed(seed)
    b, n, e = (torch.randperm(size, generator=generator) for size in (B, N, E))
    mixed = [(p[b][:, n][..., e], c[b][:, n][..., e]) for p, c in reversed(routings)]
    torch.testing.assert_close(balance_loss(mixed, kind), loss)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_batch_is_at_least_one_where_all_tokens_are_routed_alike(seed: int) -> None:
    routings = []
    for p, _ in _routings(seed):
        same = p[:1, :1].expand(B, N, E)
        routings.append((same, torch.nn.functional.one_hot(same.argmax(-1), E).float()))
    assert balance_loss(routings, "batch") >= 1 - 1e-6


def test_a_share_over_processes_makes_their_mean_the_whole_batch() -> None:
    routings = _routings(1)
    halves = [[(p[b : b + 1], c[b : b + 1]) for p, c in routings] for b in range(B)]
    share = sum(choice_share(half) for half in halves) / B
    parts = [balance_loss(half, "batch", share_LE=share) for half in halves]
    whole = balance_loss(routings, "batch")
    torch.testing.assert_close(sum(parts) / B, whole)
    leaves = [p for p, _ in routings]
    for one, two in zip(
        torch.autograd.grad(sum(parts) / B, leaves), torch.autograd.grad(whole, leaves), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_statistics_show_shares_and_collapse() -> None:
    statistics = routing_statistics(_collapsed([0, 3]))
    assert torch.equal(statistics.share_LE, torch.eye(E)[[0, 3]])
    assert statistics.entropy_L.tolist() == [0, 0]
    uniform = routing_statistics(_uniform())
    torch.testing.assert_close(uniform.entropy_L, torch.ones(L))
    random = routing_statistics(_routings(3))
    torch.testing.assert_close(random.share_LE.sum(1), torch.ones(L))
    assert not random.share_LE.requires_grad


def test_nothing_to_balance_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no layer with experts.*expected at least one"):
        balance_loss([], "batch")
    with pytest.raises(ConfigError, match=r"'global'; expected 'sample' .* or 'batch'"):
        balance_loss(_uniform(), "global")  # type: ignore[arg-type]
