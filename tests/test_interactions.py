"""Interactions against the definition written out in plain loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.numeric.interactions import Entry, Interactions, interactions_of

A, B, C = ("a", "w4"), ("b", "w4"), ("activation x", "a8")


def embeddings(samples: int = 70) -> dict[Entry, NDArray[np.float32]]:
    """70 samples: more than are multiplied at a time."""
    rng = np.random.default_rng(3)
    return {entry: rng.standard_normal((samples, 5)).astype(np.float32) for entry in (A, B, C)}


def test_loss_of_a_plan_is_half_the_squared_norm_of_the_summed_changes() -> None:
    changes = embeddings()
    interactions = interactions_of(changes)
    assert interactions.entries == (A, B, C)
    for count in range(4):
        for chosen in combinations(changes, count):
            summed = sum((changes[entry].astype(np.float64) for entry in chosen), np.zeros((70, 5)))
            expected = float((summed**2).sum(axis=1).mean() / 2)
            # The same float64 products in another order.
            assert interactions.loss_of(chosen) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_changes_that_cancel_cost_nothing() -> None:
    change = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    interactions = interactions_of({A: change, B: -change})
    assert interactions.loss_of([A]) > 0
    assert interactions.loss_of([A, B]) == 0
    off_by_rounding = Interactions((A, B), np.array([[1.0, -1.0 - 1e-16], [-1.0 - 1e-16, 1.0 - 3e-16]]))
    assert off_by_rounding.loss_of([A, B]) == 0


def test_calibration_takes_the_diagonal_and_keeps_the_correlations() -> None:
    measured = interactions_of(embeddings())
    steadied = measured.calibrated({A: 4.0, C: 0.0, ("elsewhere", "w2"): 7.0})
    own = measured.loss_of([B])
    assert [steadied.loss_of([entry]) for entry in (A, B, C)] == [4.0, own, 0.0]
    correlation = measured.gram[0, 1] / np.sqrt(measured.gram[0, 0] * measured.gram[1, 1])
    assert steadied.gram[0, 1] / np.sqrt(4.0 * own) == pytest.approx(correlation, rel=1e-12)
    assert not steadied.gram[2].any()
    assert measured.loss_of([A]) != 4.0  # the original is as it was


def test_an_embedding_of_nothing_takes_the_loss_of_the_table_without_cross_terms() -> None:
    changes = embeddings() | {C: np.zeros((70, 5), np.float32)}
    steadied = interactions_of(changes).calibrated({C: 2.0})
    assert steadied.loss_of([C]) == 2.0
    assert steadied.loss_of([A, C]) == pytest.approx(steadied.loss_of([A]) + 2.0, rel=1e-12)


def test_no_embeddings() -> None:
    assert interactions_of({}).loss_of([]) == 0


def test_what_cannot_be_used_is_refused() -> None:
    changes = embeddings()
    with pytest.raises(UsageError, match=r"shapes \(70, 4\), \(70, 5\)"):
        interactions_of(changes | {B: changes[B][:, :4]})
    with pytest.raises(UsageError, match="'b' in w4 is not finite"):
        interactions_of(changes | {B: changes[B] * np.float32(np.nan)})
    with pytest.raises(UsageError, match="'b' in w8 has no embedding"):
        interactions_of(changes).loss_of([A, ("b", "w8")])
    with pytest.raises(UsageError, match="negative"):
        interactions_of(changes).calibrated({A: -1.0})
    with pytest.raises(UsageError, match="double"):
        Interactions((A, A), np.eye(2))
    with pytest.raises(UsageError, match="square"):
        Interactions((A, B), np.eye(3))
    with pytest.raises(UsageError, match="symmetric"):
        Interactions((A, B), np.array([[1.0, 0.5], [0.0, 1.0]]))
