import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.distill import effective_rank, kd_loss, token_statistics
from movekd.errors import ConfigError

B, N, WIDTHS = 3, 4, (5, 2)


def _case(
    seed: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predictions = [torch.randn(B, N, d, generator=generator) for d in WIDTHS]
    targets = [torch.randn(B, N, d, generator=generator) for d in WIDTHS]
    teachers = torch.rand(B, len(WIDTHS), generator=generator)
    tokens = torch.rand(B, N, generator=generator)
    return predictions, targets, teachers, tokens


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_and_gradient_equal_the_equations_written_with_loops(
    combine: str, weighted: bool
) -> None:
    predictions, targets, teachers, tokens = _case()
    predictions = [p.requires_grad_() for p in predictions]
    terms = kd_loss(predictions, targets, teachers, tokens if weighted else None, combine=combine)
    gradients = torch.autograd.grad(terms.total_B.sum(), predictions)

    total = torch.tensor(0.0)
    for b in range(B):
        sample = torch.tensor(0.0)
        for t, width in enumerate(WIDTHS):
            l = [  # noqa: E741
                sum((predictions[t][b, n, d] - targets[t][b, n, d]) ** 2 for d in range(width))
                / width
                for n in range(N)
            ]
            mean = sum(l) / N
            if not weighted:
                loss = mean
            elif combine == "mean":
                loss = sum(tokens[b, n] * l[n] for n in range(N)) / N
            else:
                loss = mean + sum(tokens[b, n] * l[n] for n in range(N))
            torch.testing.assert_close(terms.per_teacher_BT[b, t], loss)
            sample = sample + teachers[b, t] * loss
        torch.testing.assert_close(terms.total_B[b], sample)
        total = total + sample
    for found, expected in zip(gradients, torch.autograd.grad(total, predictions), strict=True):
        torch.testing.assert_close(found, expected)


def test_autocast_and_half_inputs_leave_the_loss_in_float32() -> None:
    predictions, targets, teachers, tokens = _case()
    halves = [p.bfloat16() for p in predictions]
    exact = kd_loss([p.float() for p in halves], targets, teachers, tokens, combine="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = kd_loss(halves, targets, teachers, tokens, combine="sum")
    assert terms.total_B.dtype == torch.float32
    torch.testing.assert_close(terms.total_B, exact.total_B)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), combine=st.sampled_from(["mean", "sum"]))
def test_order_of_tokens_samples_and_teachers_does_not_matter(seed: int, combine: str) -> None:
    predictions, targets, teachers, tokens = _case(seed)
    expected = kd_loss(predictions, targets, teachers, tokens, combine=combine).total_B
    assert (expected >= 0).all()
    n = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    b = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    found = kd_loss(
        [p[b][:, n] for p in reversed(predictions)],
        [t[b][:, n] for t in reversed(targets)],
        teachers[b].flip(1),
        tokens[b][:, n],
        combine=combine,
    ).total_B
    torch.testing.assert_close(found, expected[b])


def test_equal_tokens_cost_nothing_and_unit_weights_are_no_weights() -> None:
    predictions, targets, teachers, _ = _case()
    assert (kd_loss(targets, targets, teachers, combine="sum").total_B == 0).all()
    plain = kd_loss(predictions, targets, teachers, combine="mean").total_B
    ones = kd_loss(predictions, targets, teachers, torch.ones(B, N), combine="mean").total_B
    torch.testing.assert_close(ones, plain)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    predictions, targets, teachers, tokens = _case()
    with pytest.raises(ConfigError, match=r"'median'; expected 'mean'"):
        kd_loss(predictions, targets, teachers, combine="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"2 predictions, 1 targets and weights of 2 teachers"):
        kd_loss(predictions, targets[:1], teachers, combine="mean")
    with pytest.raises(ConfigError, match=r"teacher 1: .*\(3, 4, 2\).*target are \(3, 1, 2\)"):
        kd_loss(predictions, [targets[0], targets[1][:, :1]], teachers, combine="mean")
    with pytest.raises(ConfigError, match=r"token weights are \(3, 1\); expected \(3, 4\)"):
        kd_loss(predictions, targets, teachers, tokens[:, :1], combine="mean")
    with pytest.raises(ConfigError, match=r"teacher weights are \(1,\); expected \(3,\)"):
        kd_loss(predictions, targets, teachers[:1], combine="mean")


def test_token_statistics_shrink_with_the_tokens_and_ignore_where_they_are() -> None:
    tokens = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    spread = token_statistics(tokens)
    channels = [tokens[..., d].flatten().std(correction=0) for d in range(8)]
    torch.testing.assert_close(spread, (sum(channels) / 8).detach())
    torch.testing.assert_close(token_statistics(0.1 * tokens + 5), 0.1 * spread)
    assert token_statistics(torch.ones(2, 5, 3)) == 0
    assert not spread.requires_grad


def test_effective_rank_equals_the_equation_and_counts_equal_directions() -> None:
    tokens = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    centred = tokens.detach().double().flatten(0, 1) - tokens.detach().double().flatten(0, 1).mean(
        0
    )
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    share = values / values.sum()
    expected = sum(-p * p.log() for p in share).exp()
    rank = effective_rank(tokens)
    torch.testing.assert_close(rank, expected.float())
    assert not rank.requires_grad
    assert 7 < rank < 8  # noise uses all directions alike, almost
    corners = torch.cat([torch.eye(4), -torch.eye(4)])[None]
    torch.testing.assert_close(effective_rank(corners), torch.tensor(4.0))
    torch.testing.assert_close(effective_rank(3 * corners + 5), torch.tensor(4.0))


def test_effective_rank_falls_to_one_when_the_tokens_collapse_onto_a_line() -> None:
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(2, 20, 1, generator=generator) * torch.randn(1, 1, 8, generator=generator)
    torch.testing.assert_close(effective_rank(line), torch.tensor(1.0), rtol=0, atol=1e-3)
    assert token_statistics(line) > 0.1  # the spread alone would not tell
    assert effective_rank(torch.ones(2, 5, 3)) == 1  # no direction at all
    assert effective_rank(torch.full((2, 5, 3), float("inf"))).isnan()


def test_effective_rank_looks_at_a_bounded_number_of_tokens_in_half_precision_too() -> None:
    tokens = torch.randn(3, 1000, 8, generator=torch.Generator().manual_seed(0))
    assert effective_rank(tokens, max_tokens=4) <= 3.01  # four centred tokens have rank three
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rank = effective_rank(tokens.bfloat16())
    assert rank.dtype == torch.float32
    torch.testing.assert_close(rank, effective_rank(tokens), rtol=1e-2, atol=0)
