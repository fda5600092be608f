"""Rank correlation against scipy's, what its interval covers, and the reliability that is made from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lcpaq_onnx.numeric.ranking import correlation_interval, rank_correlation
from lcpaq_onnx.passes.analysis.reliability import split_half_reliability

# Few different values: ties are frequent.
PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30)
UNTIED = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30, unique=True)


@given(PAIRS)
def test_rank_correlation_is_scipys_with_ties_too(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


@given(UNTIED)
def test_only_the_order_counts(values: list[float]) -> None:
    shuffled = np.random.default_rng(len(values)).permutation(values)
    cubed = np.argsort(np.argsort(values)) ** 3 - 5.0
    assert rank_correlation(values, shuffled) == pytest.approx(rank_correlation(list(cubed), shuffled), abs=1e-12)
    assert rank_correlation(values, values) == pytest.approx(1)
    assert rank_correlation(values, [-value for value in values]) == pytest.approx(-1)
    assert rank_correlation(values, shuffled) == pytest.approx(rank_correlation(shuffled, values), abs=1e-12)


@given(st.floats(-1, 1), st.integers(4, 10_000))
def test_the_interval_holds_the_correlation_and_narrows_with_more_pairs(correlation: float, count: int) -> None:
    low, high = correlation_interval(correlation, count)
    assert -1 <= low <= correlation <= high <= 1
    assert correlation_interval(-correlation, count) == pytest.approx((-high, -low))
    if abs(correlation) <= 1 - 6 / (count**3 - count):  # ranks of so many pairs do not come nearer to perfect order
        narrower = correlation_interval(correlation, 4 * count)
        assert low <= narrower[0] <= narrower[1] <= high


def test_few_pairs_in_perfect_order_are_no_certainty() -> None:
    low, high = correlation_interval(1.0, 6)
    assert 0.3 < low < 0.8
    assert high == 1.0
    assert correlation_interval(1.0, 200)[0] > 0.999


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_few_pairs_say_nothing(count: int) -> None:
    assert correlation_interval(0.9, count) == (-1.0, 1.0)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("count", [12, 40])
def test_the_interval_covers(correlation: float, count: int) -> None:
    """95 % of the time, for pairs of normal variables, whose rank correlation is 6/π asin(ρ/2)."""
    rng = np.random.default_rng(count)
    truth = 6 / np.pi * np.arcsin(correlation / 2)
    covered = 0
    for _ in range(400):
        x, noise = rng.standard_normal((2, count))
        y = correlation * x + np.sqrt(1 - correlation**2) * noise
        low, high = correlation_interval(rank_correlation(list(x), list(y)), count)
        covered += low <= truth <= high
    # 400 draws know the share to within 1.1 % (one standard error); small samples cover a little less than they say.
    assert 0.91 < covered / 400 < 0.99


# ---- reliability ----------------------------------------------------------------------------------------------------
def losses_of(layers: int, samples: int, noise: float) -> dict[tuple[str, int], np.ndarray]:
    """Layers of unlike sensitivity at two widths; samples scatter around it."""
    rng = np.random.default_rng(layers + samples)
    level = np.exp(rng.normal(size=layers))
    return {
        (f"l{layer}", bits): level[layer] * 4.0**-bits * np.exp(noise * rng.normal(size=samples))
        for layer in range(layers)
        for bits in (3, 6)
    }


def test_samples_that_agree_are_reliable_and_noise_is_not() -> None:
    assert split_half_reliability(losses_of(12, 32, 0.0)) == pytest.approx(1)
    assert split_half_reliability(losses_of(12, 32, 1.0)) > 0.8
    rng = np.random.default_rng(0)
    nothing = {(f"l{layer}", 4): rng.exponential(size=32) for layer in range(40)}
    assert split_half_reliability(nothing) < 0.5


def test_reliability_is_that_of_all_samples_not_of_half() -> None:
    """Spearman and Brown: with r between the halves, 2r / (1 + r) for the whole."""
    # Ranks 1 2 3 4 against 1 2 4 3: a correlation of 0.8.
    halves = zip([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0], strict=True)
    losses = {(f"l{layer}", 4): np.array(pair * 8) for layer, pair in enumerate(halves)}
    assert split_half_reliability(losses) == pytest.approx(1.6 / 1.8)


def test_a_width_is_compared_with_itself() -> None:
    """That 3 bits lose more than 6 everywhere is no ranking: it would hide that layers are in no order."""
    rng = np.random.default_rng(1)
    losses = {(f"l{i}", bits): 64.0 ** (3 - bits) * rng.exponential(size=16) for i in range(20) for bits in (3, 6)}
    assert split_half_reliability(losses) < 0.6


def test_nothing_to_rank_is_reliable() -> None:
    assert split_half_reliability({}) == 1.0
    assert split_half_reliability({(f"l{i}", 4): np.ones(1) for i in range(9)}) == 1.0
    assert split_half_reliability({(f"l{i}", 4): np.ones(8) for i in range(3)}) == 1.0
    assert split_half_reliability({(f"l{i}", 4): np.zeros(8) for i in range(9)}) == 1.0
