"""Projections keep inner products on average, within the stated variance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcpaq_onnx.numeric import projection
from lcpaq_onnx.numeric.projection import projected


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 60))
def test_the_shape_is_at_most_what_was_asked_for(rows: int, columns: int, length: int) -> None:
    values = np.random.default_rng(0).normal(size=(rows, columns))
    found = projected(values, length)
    assert found.shape == (rows, min(columns, length))
    if columns <= length:
        np.testing.assert_array_equal(found, values)


@given(st.integers(0, 100), st.floats(-4, 4), st.integers(2, 30))
def test_it_is_linear_and_the_same_for_every_call(seed: int, factor: float, length: int) -> None:
    a, b = np.random.default_rng(seed).normal(size=(2, 3, 100))
    np.testing.assert_array_equal(projected(a, length), projected(a.copy(), length))
    # Sums of a few numbers of size 1 in float64.
    together = projected(factor * a + b, length)
    np.testing.assert_allclose(together, factor * projected(a, length) + projected(b, length), atol=1e-12)
    # Rows do not know of each other.
    np.testing.assert_allclose(projected(a[1:2], length), projected(a, length)[1:2], atol=1e-12)


@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("aligned", [False, True])
def test_inner_products_are_kept_on_average_within_the_stated_variance(
    monkeypatch: pytest.MonkeyPatch, length: int, aligned: bool
) -> None:
    """Over many draws of signs and buckets for the same two vectors."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(1, 300))
    b = a if aligned else a + 2 * rng.normal(size=(1, 300))
    products = []
    for seed in range(1500):
        monkeypatch.setattr(projection, "_SEED", seed)
        products.append((projected(a, length) @ projected(b, length).T).item())
    truth = (a @ b.T).item()
    variance = 2 * (a**2).sum() * (b**2).sum() / length
    # Four standard errors of the mean of 1500; the sample variance is known to some 5 %.
    assert abs(np.mean(products) - truth) < 4 * np.sqrt(variance / 1500)
    assert np.var(products) < 1.15 * variance


def test_a_gram_of_many_classes_is_close() -> None:
    """1000 numbers in 128: norms within what the variance says, 4 standard deviations."""
    values = np.random.default_rng(2).normal(size=(64, 1000))
    found = projected(values, 128)
    ratio = (found**2).sum(axis=1) / (values**2).sum(axis=1)
    assert np.abs(ratio - 1).max() < 4 * np.sqrt(2 / 128)
    # Every sample has its own error, so means over samples are closer.
    assert ratio.mean() == pytest.approx(1, abs=4 * np.sqrt(2 / 128 / 64))
