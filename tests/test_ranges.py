"""Streaming histograms and the ranges chosen from them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.numeric.ranges import HistogramMethod, StreamingHistogram, choose_range
from lcpaq_onnx.numeric.rounding import activation_parameters, fake_quantize

FAST = settings(deadline=None, max_examples=80, derandomize=True)
EIGHT = QFormat(bits=8, signed=False, symmetric=False)
SIGNED = QFormat(bits=8, symmetric=True)
FOUR = QFormat(bits=4, signed=False, symmetric=False)
METHODS: tuple[HistogramMethod, ...] = ("minmax", "percentile", "mse", "entropy")


def histogram_of(*batches: np.ndarray) -> StreamingHistogram:
    histogram = StreamingHistogram()
    for batch in batches:
        histogram.update(np.asarray(batch, np.float32))
    return histogram


def rounding_error(values: np.ndarray, low: float, high: float, format: QFormat) -> float:
    """Mean squared error of quantizing the values themselves."""
    rounded = fake_quantize(values.astype(np.float32), *activation_parameters(low, high, format), format)
    return float(((rounded.astype(np.float64) - values) ** 2).mean())


# ---- histogram ------------------------------------------------------------------------------------------------------
@FAST
@given(
    values=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32)),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_any_split_keeps_extremes_count_and_moments(values: np.ndarray, cuts: list[int]) -> None:
    histogram = histogram_of(*np.split(values, sorted(cut for cut in cuts if cut <= len(values))))
    assert histogram.minimum == values.min()
    assert histogram.maximum == values.max()
    assert histogram.counts.sum() == len(values)
    # Each value is counted in a bin within a bin's width, and each doubling moves it by at most half of the new one.
    centers = histogram.centers
    width = centers[1] - centers[0]
    mean = float(histogram.counts @ centers / len(values))
    assert abs(mean - values.astype(np.float64).mean()) <= 2 * width + 1e-6 * np.abs(values).max()
    spread = np.sqrt(histogram.counts @ (centers - mean) ** 2 / len(values))
    assert abs(spread - values.astype(np.float64).std()) <= 2 * width + 1e-6 * np.abs(values).max()


@pytest.mark.parametrize("first_share", [0.01, 0.5])
def test_counts_are_numpys_where_the_range_is_known_at_once(first_share: float) -> None:
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    values[:2] = values.min(), values.max()
    histogram = histogram_of(*np.split(values, [int(first_share * len(values))]))
    expected, edges = np.histogram(values, bins=2048, range=(values.min(), values.max()))
    np.testing.assert_allclose(histogram.centers, (edges[1:] + edges[:-1]) / 2, rtol=0, atol=1e-6)
    # Bin edges are reached in float32: a value within a last digit of an edge may fall on the other side of it.
    assert np.abs(histogram.counts - expected).sum() <= 20


def test_a_growing_range_keeps_quantiles_within_a_bin() -> None:
    rng = np.random.default_rng(1)
    batches = [rng.normal(size=5_000).astype(np.float32) * scale for scale in (0.1, 1, 3, 30)]
    histogram, values = histogram_of(*batches), np.concatenate(batches)
    width = histogram.centers[1] - histogram.centers[0]
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    for quantile in (0.01, 0.25, 0.5, 0.75, 0.99):
        found = histogram.centers[np.searchsorted(share, quantile)]
        assert abs(found - np.quantile(values, quantile)) <= 2 * width


def test_memory_does_not_grow_with_the_data() -> None:
    histogram = StreamingHistogram()
    sizes = set()
    for seed in range(20):
        histogram.update(np.random.default_rng(seed).normal(size=1000).astype(np.float32) * (seed + 1))
        sizes.add(histogram.counts.nbytes + sum(sys.getsizeof(value) for value in vars(histogram).values()))
    assert histogram.counts.shape == (2048,)
    assert max(sizes) - min(sizes) < 200  # numbers of another type after the first batch


def test_large_batches_are_sampled_but_their_extremes_are_exact() -> None:
    values = np.random.default_rng(2).normal(size=(8, 64, 40, 40)).astype(np.float32)
    values[3, 5, 7, 9], values[0, 0, 0, 1] = 17, -19
    histogram = histogram_of(values)
    assert (histogram.minimum, histogram.maximum) == (-19, 17)
    assert histogram.counts.sum() < 100_000
    # 32,768 or more samples of unit variance: the mean is within 4/181, the standard deviation within 3/256.
    centers, share = histogram.centers, histogram.counts / histogram.counts.sum()
    assert abs(share @ centers) < 0.022
    assert abs(np.sqrt(share @ centers**2) - 1) < 0.02


@pytest.mark.parametrize("value", [0.0, 3.5, -2.25])
def test_a_constant_stream_and_what_comes_after(value: float) -> None:
    histogram = histogram_of(np.full(5, value), np.full(7, value))
    assert (histogram.minimum, histogram.maximum) == (value, value)
    found = choose_range(histogram, "mse", EIGHT)
    assert found.low <= value <= found.high
    histogram.update(np.array([value - 1, value + 1], np.float32))
    assert histogram.counts.sum() == 14
    mean = histogram.counts @ histogram.centers / 14
    assert abs(mean - value) <= 2 / 2048


def test_empty_batches_are_ignored_and_nothing_seen_is_said() -> None:
    histogram = histogram_of(np.zeros((0, 3)))
    found = choose_range(histogram, "mse", EIGHT)
    assert (found.low, found.high, found.method) == (0.0, 0.0, "never observed")


# ---- choices --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", [EIGHT, SIGNED, FOUR], ids=str)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(values=hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-100, 100, width=32)))
def test_every_range_lies_inside_what_was_seen(method: HistogramMethod, format: QFormat, values: np.ndarray) -> None:
    found = choose_range(histogram_of(values), method, format)
    assert values.min() <= found.low
    assert found.high <= values.max()
    assert (found.minimum, found.maximum) == (values.min(), values.max())


def test_minmax_covers_all_values() -> None:
    values = np.array([-3, 0.5, 40], np.float32)
    found = choose_range(histogram_of(values), "minmax", EIGHT)
    assert (found.low, found.high, found.method) == (-3, 40, "minmax")


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_numpys(percentile: float) -> None:
    values = np.random.default_rng(3).normal(size=30_000).astype(np.float32)
    histogram = histogram_of(values)
    found = choose_range(histogram, "percentile", EIGHT, percentile=percentile)
    tail = (100 - percentile) / 2
    width = histogram.centers[1] - histogram.centers[0]
    assert found.low == pytest.approx(np.percentile(values, tail), abs=2 * width)
    assert found.high == pytest.approx(np.percentile(values, 100 - tail), abs=2 * width)


def test_mse_clips_outliers_of_a_gaussian() -> None:
    values = np.random.default_rng(4).normal(size=30_000).astype(np.float32)
    values[:3] = [60, -60, 55]
    found = choose_range(histogram_of(values), "mse", FOUR)
    # 16 uniform levels on a unit Gaussian are best over ±2.7 (Max 1960, table II: step 0.335); the outliers pull a bit.
    assert -24 < found.low < -2
    assert 2 < found.high < 24
    assert rounding_error(values, found.low, found.high, FOUR) < 0.5 * rounding_error(values, -60, 60, FOUR)


def test_mse_clips_a_gaussian_at_four_bits_near_the_known_optimum() -> None:
    values = np.random.default_rng(5).normal(size=32_000).astype(np.float32)
    found = choose_range(histogram_of(values), "mse", FOUR)
    # Max 1960, table II: error 0.01154 at 16 levels. The zero point is an integer, and the ends are on a grid.
    assert rounding_error(values, found.low, found.high, FOUR) < 1.08 * 0.01154


@pytest.mark.parametrize("format", [EIGHT, SIGNED, FOUR], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_mse_is_not_worse_than_minmax_in_squared_error(format: QFormat, seed: int) -> None:
    rng = np.random.default_rng(seed)
    draws = [rng.normal(size=20_000), rng.exponential(size=20_000), rng.standard_t(3, size=20_000)]
    draws += [np.maximum(draws[0], 0), rng.uniform(-1, 5, size=20_000), np.round(draws[0])]
    values = draws[seed].astype(np.float32)
    found = choose_range(histogram_of(values), "mse", format)
    minmax = rounding_error(values, float(values.min()), float(values.max()), format)
    # The histogram knows values to 1/2048 of the range only: an eighth of a step of 8 bits.
    slack = ((values.max() - values.min()) / 2048) ** 2
    assert rounding_error(values, found.low, found.high, format) <= minmax + slack


def divergence(values: np.ndarray, low: float, high: float, format: QFormat) -> float:
    """KL of the values' histogram from that of the quantized values, each level's mass even over its own bins."""
    counts, edges = np.histogram(np.clip(values, low, high), bins=2048, range=(values.min(), values.max()))
    centers = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)
    level = fake_quantize(centers, *activation_parameters(low, high, format), format)
    spread = np.zeros(2048)
    for value in np.unique(level):
        here = (level == value) & (counts > 0)
        spread[here] = counts[here].mean() if here.any() else 0
    return float(special.rel_entr(counts / counts.sum(), np.maximum(spread / spread.sum(), 1e-12)).sum())


def test_entropy_is_not_worse_than_minmax_in_divergence() -> None:
    values = np.random.default_rng(6).normal(size=32_000).astype(np.float32)
    values[:2] = [30, -30]
    found = choose_range(histogram_of(values), "entropy", FOUR)
    assert found.method == "entropy"
    assert max(abs(found.low), found.high) < 29
    assert divergence(values, found.low, found.high, FOUR) < divergence(values, -30, 30, FOUR)


@pytest.mark.parametrize("method", METHODS)
def test_a_relu_range_starts_at_zero(method: HistogramMethod) -> None:
    values = np.maximum(np.random.default_rng(7).normal(size=20_000), 0).astype(np.float32)
    found = choose_range(histogram_of(values), method, EIGHT)
    _, zero_point = activation_parameters(found.low, found.high, EIGHT)
    # Zero point at the least integer lets the runtime drop the Relu. A bin's width is far less than half a step.
    assert zero_point == 0


def test_choosing_is_deterministic() -> None:
    values = np.random.default_rng(8).normal(size=9_000).astype(np.float32)
    for method in METHODS:
        assert choose_range(histogram_of(values), method, EIGHT) == choose_range(histogram_of(values), method, EIGHT)
