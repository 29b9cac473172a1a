import hashlib

import numpy as np
import pytest
import torch
from scipy.stats import norm

import heavy_tails
from builds import build
from movekd.analysis.disk_benchmark import DiskRates
from movekd.analysis.fidelity import measure_fidelity
from movekd.analysis.plan import plan_cache
from movekd.cache.codecs import codec, codec_names
from movekd.cache.codecs.lloyd import POSITIVE_LEVELS
from movekd.cache.stats import ChannelStats
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError
from movekd.extract.options import BuildOptions
from student_t import plain, student_t

NAMES = ("lloyd4", "lloyd3", "lloyd2")
MEAN_ERROR = {"lloyd4": 0.10, "lloyd3": 0.19, "lloyd2": 0.35}
SIZE = {"lloyd4": 0.26, "lloyd3": 0.20, "lloyd2": 0.135}


def stats_of(name: str, width: int) -> ChannelStats:
    return plain(width).for_codec(codec(name))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_those_of_lloyd_and_max(bits: int) -> None:
    """Each is the mean of a normal value between the middles to its neighbours: no change helps."""
    positive = np.array(POSITIVE_LEVELS[bits])
    levels = np.concatenate([-positive[::-1], positive])
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    mean = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
    np.testing.assert_allclose(levels, mean, rtol=0, atol=2e-9)
    grid = np.linspace(-10, 10, 200_001)  # the error by integration, against the published one
    distance = np.abs(grid[:, None] - levels).min(1)
    energy = np.trapezoid(distance**2 * norm.pdf(grid), grid)
    assert energy == pytest.approx({2: 0.1175, 3: 0.03454, 4: 0.009497}[bits], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [student_t, torch.randn])
def test_the_error_does_not_depend_on_the_tails(name: str, make) -> None:
    torch.manual_seed(0)
    tokens, stats = make(1, 1000, 1024), stats_of(name, 1024)
    stored = codec(name).encode(tokens, stats)
    errors = codec(name).error(tokens, stored, stats)
    assert 0.95 * MEAN_ERROR[name] < errors.sum.item() / 1000 <= MEAN_ERROR[name]
    assert errors.max.item() < 1.35 * MEAN_ERROR[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_a_row_of_clip(name: str) -> None:
    size = sum(array.row_bytes for array in codec(name).arrays(576, 1024))
    assert size / (576 * 1024 * 2) <= SIZE[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [8, 12, 20, 96, 144, 384, 1280])
def test_rotated_and_back(name: str, width: int) -> None:
    stats = stats_of(name, width)
    tokens = student_t(2, 9, width)
    rotated = codec(name).rotate(tokens, stats)
    arrays = {key: array.numpy().astype(float) for key, array in stats.codec_arrays.items()}
    whole = np.kron(arrays["rotation_left"], arrays["rotation_right"]) * arrays["rotation_signs"]
    expected = tokens.double().numpy() @ whole.T / width**0.5
    np.testing.assert_allclose(rotated, expected, atol=1e-5)
    torch.testing.assert_close(rotated.norm(dim=-1), tokens.norm(dim=-1))
    stored = codec(name).encode(tokens, stats)
    decoded = codec(name).decode_rotated(stored, stats)
    back = codec(name).decode_standardised(stored, stats)
    torch.testing.assert_close(codec(name).rotate(back, stats), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loud", [30.0, 1_000.0, -60_000.0])
def test_one_outlier_takes_no_bits_from_the_other_channels(name: str, loud: float) -> None:
    """It may hold at most an eighth of the others' energy before it is stored outside."""
    tokens, stats = torch.randn(1, 200, 1024, generator=torch.manual_seed(0)), stats_of(name, 1024)
    tokens[..., 77] = loud
    stored = codec(name).encode(tokens, stats)
    decoded = codec(name).decode_standardised(stored, stats)
    others = torch.arange(1024) != 77
    difference = (decoded - tokens)[..., others].norm(dim=-1)
    error = (difference / tokens[..., others].norm(dim=-1)).max().item()
    assert error < 1.15 * MEAN_ERROR[name] * (1 + 1 / 8) ** 0.5
    assert (decoded[..., 77] - loud).abs().max() < 16 + 4 * MEAN_ERROR[name]  # half a float16 step


def test_signs_are_bits_of_digests_and_depend_on_the_width_only_in_their_number() -> None:
    signs = codec("lloyd4").group_arrays(1024)["rotation_signs"]
    digest = hashlib.sha256(b"movekd rotation signs 1").digest()
    bits = [digest[k // 8] >> (7 - k % 8) & 1 for k in range(256)]
    assert signs[256:512].tolist() == [1 - 2 * bit for bit in bits]
    assert codec("lloyd2").group_arrays(96)["rotation_signs"].tolist() == signs[:96].tolist()
    assert set(codec("lloyd4").group_arrays(1024)) == {
        "levels", "rotation_left", "rotation_right", "rotation_signs",
    }  # fmt: skip


def test_the_stored_arrays_decode_not_those_of_this_version() -> None:
    stats = stats_of("lloyd4", 96)
    tokens = student_t(1, 4, 96).clamp(-2, 2)  # no outliers: they have no level
    stored = codec("lloyd4").encode(tokens, stats)
    decoded = codec("lloyd4").decode_rotated(stored, stats)
    doubled = dict(stats.codec_arrays) | {"levels": stats.codec_arrays["levels"] * 2}
    other = ChannelStats(stats.mean_D, stats.std_D, doubled)
    assert torch.equal(codec("lloyd4").decode_rotated(stored, other), decoded * 2)
    turned = dict(stats.codec_arrays) | {"rotation_signs": -stats.codec_arrays["rotation_signs"]}
    other = ChannelStats(stats.mean_D, stats.std_D, turned)
    expected = -codec("lloyd4").decode_standardised(stored, stats)
    assert torch.equal(codec("lloyd4").decode_standardised(stored, other), expected)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_round_the_rotation(name: str) -> None:
    stats = stats_of(name, 96)
    stored = codec(name).encode(student_t(1, 4, 96), stats)
    expected = codec(name).decode_standardised(stored, stats)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec(name).decode_standardised(stored, stats), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_what_is_no_number_is_refused(bad: float) -> None:
    tokens = torch.ones(1, 2, 96)
    tokens[0, 1, 2] = bad
    with pytest.raises(CacheError, match="lloyd3"):
        codec("lloyd3").encode(tokens, stats_of("lloyd3", 96))


def test_a_place_outside_of_the_token_reads_no_other_memory() -> None:
    """Checksums protect against damage, not against a stranger's file."""
    stats = stats_of("lloyd4", 96)
    stored = codec("lloyd4").encode(student_t(1, 4, 96), stats)
    for place in (-3.0, 999.0, float("nan"), float("inf")):
        stored["token_scale"][..., 1] = 2.0
        stored["token_scale"][..., 2:] = place
        assert codec("lloyd4").decode_rotated(stored, stats).isfinite().all()
        assert codec("lloyd4").decode_standardised(stored, stats).isfinite().all()


def test_zeros_stay_zeros_and_a_width_without_a_matrix_is_refused() -> None:
    stats = stats_of("lloyd2", 8)
    stored = codec("lloyd2").encode(torch.zeros(1, 2, 8), stats)
    assert torch.equal(codec("lloyd2").decode(stored, stats), torch.zeros(1, 2, 8))
    for ask in (lambda: stats_of("lloyd2", 130), lambda: codec("lloyd2").arrays(4, 130)):
        with pytest.raises(CacheError, match="130 channels cannot be rotated"):
            ask()


def test_a_width_without_a_matrix_is_refused_by_a_build_at_its_first_batch(
    tmp_path, corpus_dir
) -> None:
    """``plan`` and ``fidelity`` name it and show the other codecs."""
    spec = heavy_tails.spec(model_args={"width": 130}, calibration_images=12)
    done: list[int] = []
    with pytest.raises(CacheError, match=r"130 channels cannot be rotated.*--codec int4 or int8"):
        build(
            tmp_path / "cache",
            corpus_dir,
            [spec.with_changes(codec="lloyd3")],
            progress=lambda what, count, total: done.append(count),
        )
    assert not any(done)
    options = BuildOptions(batch_size=4, num_workers=0)
    corpus = open_corpus(corpus_dir)
    others = set(codec_names()) - set(NAMES)
    report = measure_fidelity(
        spec, corpus, geometry="crop", options=options, num_images=4, student_grid=4
    )
    assert {way.codec for way in report.ways} == others
    assert set(report.refused) == {f"{name} on 4x4" for name in NAMES}
    plan_of = {"options": options, "assumed_rates": {"heavy": 1.0}, "student_grid": 4}
    disk = DiskRates(None, 1e12, "assumed")
    plan = plan_cache([spec], corpus, tmp_path, assumed_disk=disk, **plan_of)
    assert {part.codec for part in plan.teachers} == others
    assert set(plan.refused) == {f"heavy: {name} on 4x4" for name in NAMES}
    with pytest.raises(CacheError, match="130 channels cannot be rotated"):
        plan_cache(
            [spec.with_changes(codec="lloyd2")], corpus, tmp_path, assumed_disk=disk, **plan_of
        )
