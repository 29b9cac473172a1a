import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.distill import teacher_weights, token_weights
from movekd.errors import ConfigError


def _attention(seed: int, *shape: int) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3)
    return rows.softmax(-1)[..., 1:]


def _tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize(("blend", "cap"), [(0.5, 4.0), (1.0, 2.0), (0.0, 4.0)])
def test_token_weights_equal_the_equations_written_with_loops(blend: float, cap: float) -> None:
    attention = _attention(0, 2, 3, 8)
    softmax = token_weights(attention, "softmax")
    blended = token_weights(attention, "blend", blend=blend, cap=cap)
    for b in range(2):
        a = [sum(float(attention[b, h, n]) for h in range(3)) / 3 for n in range(7)]
        expected = torch.tensor(a, dtype=torch.float64).exp()
        torch.testing.assert_close(softmax[b], (expected / expected.sum()).float())
        raw = [(1 - blend) + blend * min(7 * x / sum(a), cap) for x in a]
        torch.testing.assert_close(blended[b], torch.tensor([x / (sum(raw) / 7) for x in raw]))


@few
@given(seed=seeds, blend=st.floats(0, 1), cap=st.floats(1, 20))
def test_token_weights_are_normalised_as_stated(seed: int, blend: float, cap: float) -> None:
    attention = _attention(seed, 2, 4, 10).half()
    assert token_weights(attention, "softmax").sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    weights = token_weights(attention, "blend", blend=blend, cap=cap)
    assert weights.mean(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (weights >= 0).all()
    assert weights.dtype == torch.float32
    assert torch.equal(token_weights(attention, "none"), torch.ones(2, 9))


@few
@given(seed=seeds, kind=st.sampled_from(["softmax", "blend"]))
def test_token_weights_follow_the_tokens_when_these_are_permuted(seed: int, kind: str) -> None:
    attention = _attention(seed, 2, 4, 10)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        token_weights(attention[..., order], kind), token_weights(attention, kind)[:, order]
    )


def test_no_token_owns_the_blend() -> None:
    sink = torch.full((1, 1, 100), 1e-6)
    sink[..., 3] = 0.99
    weights = token_weights(sink, "blend")
    assert weights.max() / weights.min() < 5.1  # (0.5 + 0.5 * 4) / 0.5


def test_attention_of_zeros_gives_equal_finite_weights() -> None:
    weights = token_weights(torch.zeros(1, 2, 5), "blend")
    torch.testing.assert_close(weights, torch.ones(1, 5))


def _shares_with_loops(others: list[torch.Tensor], cls: torch.Tensor) -> torch.Tensor:
    batch, tokens, _ = others[0].shape
    u = torch.stack(
        [
            torch.stack([sum(cls[b] @ t[b, n] for n in range(tokens)) / tokens for t in others])
            for b in range(batch)
        ]
    )
    shares = u.exp() / u.exp().sum(1, keepdim=True)
    if shares.mean(0).max() > 0.8:
        shares = shares.exp() / shares.exp().sum(1, keepdim=True)
    return shares


@pytest.mark.parametrize("loudness", [0.1, 0.5, 8.0])
@pytest.mark.parametrize("anchor", [0, 1, 2, -1])
def test_anchor_equals_the_equations_written_with_loops(loudness: float, anchor: int) -> None:
    tokens = [_tokens(seed, 3, 4, 5) * 0.3 for seed in range(3)]
    at = anchor % 3
    tokens[(at + 1) % 3] = tokens[(at + 1) % 3] + loudness
    cls = _tokens(9, 3, 5).abs()
    weights = teacher_weights(tokens, "anchor", cls_BD=cls, anchor=anchor)
    others = [tokens[i] for i in range(3) if i != at]
    expected = 0.2 * _shares_with_loops(others, cls)
    torch.testing.assert_close(weights[:, [i for i in range(3) if i != at]], expected)
    torch.testing.assert_close(weights[:, at], torch.full((3,), 0.8))


def test_a_one_sided_batch_is_flattened_and_an_even_one_is_not() -> None:
    tokens = [torch.zeros(2, 3, 4), torch.full((2, 3, 4), 9.0), torch.zeros(2, 3, 4)]
    loud = teacher_weights(tokens, "anchor", cls_BD=torch.ones(2, 4))
    # softmax(1, 0) instead of (1, 0)
    torch.testing.assert_close(loud[0, 1:] / 0.2, torch.tensor([1.0, 0.0]).softmax(0))
    even = teacher_weights(tokens, "anchor", cls_BD=torch.tensor([[1.0] * 4, [-1.0] * 4]))
    torch.testing.assert_close(even[:, 1:] / 0.2, torch.eye(2), atol=1e-6, rtol=0)


@few
@given(
    seed=seeds,
    teachers=st.integers(1, 5),
    kind=st.sampled_from(["anchor", "anchor_equal", "equal", "similarity", "balanced"]),
)
def test_teacher_weights_sum_to_one(seed: int, teachers: int, kind: str) -> None:
    tokens = [_tokens(seed + i, 2, 3, 4) for i in range(teachers)]
    losses = _tokens(seed, 2, teachers).abs()
    cls = _tokens(seed, 2, 4)
    weights = teacher_weights(tokens, kind, cls_BD=cls, anchor=teachers - 1, losses_BT=losses)
    assert weights.shape == (2, teachers)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    assert weights.sum(1).tolist() == pytest.approx([1, 1])
    if kind.startswith("anchor"):
        assert weights[:, -1].tolist() == pytest.approx([0.8 if teachers > 1 else 1.0] * 2)


def test_equal_shares_take_teachers_of_any_width() -> None:
    tokens = [torch.zeros(2, 3, width) for width in (4, 5, 6, 7)]
    torch.testing.assert_close(teacher_weights(tokens, "equal"), torch.full((2, 4), 0.25))
    expected = torch.tensor([[0.8] + [0.2 / 3] * 3] * 2)
    torch.testing.assert_close(teacher_weights(tokens, "anchor_equal"), expected)


def _cka_with_loops(x: torch.Tensor, y: torch.Tensor) -> float:
    """||Xc' Yc||^2 / (||Xc' Xc|| ||Yc' Yc||) of two (N, D) sets of tokens."""
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()

    def inner(a: torch.Tensor, b: torch.Tensor) -> float:
        products = [a[:, i] @ b[:, j] for i in range(a.shape[1]) for j in range(b.shape[1])]
        return float(sum(p**2 for p in products))

    return inner(x, y) / (inner(x, x) * inner(y, y)) ** 0.5


@pytest.mark.parametrize("anchor", [0, 2])
def test_similarity_equals_the_equations_written_with_loops(anchor: int) -> None:
    tokens = [_tokens(i, 3, 6, width) + 5 * i for i, width in enumerate((4, 2, 7))]
    weights = teacher_weights(tokens, "similarity", anchor=anchor)
    for b in range(3):
        alike = [_cka_with_loops(t[b], tokens[anchor][b]) for t in tokens]
        assert alike[anchor] == pytest.approx(1)
        assert weights[b].tolist() == pytest.approx([k / sum(alike) for k in alike], rel=1e-5)
        assert weights[b].argmax() == anchor


def test_similarity_does_not_see_where_tokens_lie_how_long_or_how_turned_they_are() -> None:
    tokens = [_tokens(i, 2, 6, 4) for i in range(3)]
    turn = torch.linalg.qr(_tokens(9, 4, 4)).Q
    changed = [tokens[0], 7 * tokens[1] @ turn + 3, tokens[2]]
    expected = teacher_weights(tokens, "similarity")
    torch.testing.assert_close(teacher_weights(changed, "similarity"), expected)
    twins = teacher_weights([tokens[0], 2 * tokens[0] @ turn], "similarity")
    torch.testing.assert_close(twins, torch.full((2, 2), 0.5))


def test_teachers_without_contrast_leave_finite_weights() -> None:
    flat = teacher_weights([torch.ones(2, 5, 3), _tokens(0, 2, 5, 4)], "similarity", anchor=1)
    torch.testing.assert_close(flat, torch.tensor([[0.0, 1.0]] * 2), rtol=0, atol=1e-6)
    both = teacher_weights([torch.ones(2, 5, 3), torch.ones(2, 5, 4)], "similarity")
    torch.testing.assert_close(both, torch.full((2, 2), 0.5))


def test_balanced_equals_the_equation_and_its_gradient_is_that_of_the_logarithms() -> None:
    losses = _tokens(0, 4, 3).abs().requires_grad_()
    tokens = [torch.zeros(4, 2, 3)] * 3
    weights = teacher_weights(tokens, "balanced", losses_BT=losses)
    means = [float(sum(losses.detach()[b, t] for b in range(4)) / 4) for t in range(3)]
    expected = [(1 / m) / sum(1 / n for n in means) for m in means]
    for b in range(4):
        assert weights[b].tolist() == pytest.approx(expected)
    assert not weights.requires_grad
    (found,) = torch.autograd.grad((weights * losses).sum(), losses)
    (logarithms,) = torch.autograd.grad(losses.mean(0).log().sum(), losses)
    torch.testing.assert_close(found / found.sum(), logarithms / logarithms.sum())
    perfect = teacher_weights(tokens, "balanced", losses_BT=torch.zeros(4, 3))
    torch.testing.assert_close(perfect, torch.full((4, 3), 1 / 3))


def test_gradient_reaches_the_adapted_tokens() -> None:
    tokens = [_tokens(i, 2, 3, 4).requires_grad_() for i in range(3)]
    teacher_weights(tokens, "anchor", cls_BD=_tokens(9, 2, 4))[:, 1].sum().backward()
    assert tokens[0].grad is None  # the anchor's own
    assert all(tokens[i].grad is not None and tokens[i].grad.abs().sum() > 0 for i in (1, 2))


def test_unknown_kinds_are_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'softmx'.*softmax, blend, none.*'softmax'\?"):
        token_weights(torch.zeros(1, 1, 2), "softmx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'anchr'.*Did you mean 'anchor'\?"):
        teacher_weights([torch.zeros(1, 2, 3)], "anchr")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"without the anchor's \[CLS\].*cls: true"):
        teacher_weights([torch.zeros(1, 2, 3)] * 2, "anchor")
    with pytest.raises(ConfigError, match=r"of \[2, 5\] places.*distill.grid: student"):
        teacher_weights([torch.zeros(1, 2, 3), torch.zeros(1, 5, 3)], "similarity")
    with pytest.raises(ConfigError, match=r"without losses; expected losses_BT"):
        teacher_weights([torch.zeros(1, 2, 3)] * 2, "balanced")
