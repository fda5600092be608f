"""Interactions against the definition written out in plain loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.numeric.interactions import Entry, Interactions, interactions_of, steadied_interactions

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
    with pytest.raises(UsageError, match="double"):
        Interactions((A, A), np.eye(2))
    with pytest.raises(UsageError, match="square"):
        Interactions((A, B), np.eye(3))
    with pytest.raises(UsageError, match="symmetric"):
        Interactions((A, B), np.array([[1.0, 0.5], [0.0, 1.0]]))


# ---- few samples ----------------------------------------------------------------------------------------------------
def correlations(known: Interactions) -> np.ndarray:
    """Of different entries."""
    scale = np.sqrt(np.diagonal(known.gram))
    return (known.gram / np.outer(scale, scale))[~np.eye(len(scale), dtype=bool)]


def drawn(samples: int, entries: int, shared: float, seed: int = 0) -> dict[Entry, np.ndarray]:
    """Noise of its own for each entry, and ``shared`` times one that is common to all."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((samples, 4))
    return {
        (f"layer{index}", "w4"): (rng.standard_normal((samples, 4)) + shared * common).astype(np.float32)
        for index in range(entries)
    }


def test_what_both_halves_of_the_samples_show_is_kept() -> None:
    twice = {entry: np.repeat(rows, 2, axis=0) for entry, rows in drawn(6, 8, 0.5).items()}
    np.testing.assert_allclose(steadied_interactions(twice).gram, interactions_of(twice).gram, rtol=1e-9, atol=1e-12)


def test_correlations_by_chance_are_drawn_to_their_mean() -> None:
    alone, together = drawn(8, 30, 0.0), drawn(8, 30, 2.0)
    chance = correlations(interactions_of(alone))
    # 32 numbers an entry: correlations of 0.18 by chance. Next to nothing of them is left.
    assert 0.1 < chance.std() < 0.3
    assert correlations(steadied_interactions(alone)).std() < 0.5 * chance.std()
    # What all entries have in common is no chance.
    assert correlations(steadied_interactions(together)).mean() == pytest.approx(0.8, abs=0.1)


def test_losses_of_single_entries_stay_and_too_few_samples_show_nothing_else() -> None:
    rows = drawn(3, 5, 1.0)
    steadied = steadied_interactions(rows)
    assert not correlations(steadied).any()
    np.testing.assert_allclose(np.diagonal(steadied.gram), np.diagonal(interactions_of(rows).gram))
    assert steadied_interactions({}).loss_of([]) == 0
