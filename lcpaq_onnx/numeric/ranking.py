"""Rank correlation and how sure it is. Pure numpy: ``scipy.stats`` takes longer to import than an analysis to run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["correlation_interval", "rank_correlation"]

_NORMAL_95 = 1.959964


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's coefficient; equal values share their mean rank. nan where one side has a single value."""
    ranks = np.stack([_ranks(np.asarray(values, np.float64)) for values in (first, second)])
    if (np.ptp(ranks, axis=1) == 0).any():
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def correlation_interval(correlation: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a rank correlation over ``count`` pairs: Fisher's transformation with the standard
    error of Bonett and Wright (2000). (−1, 1) for fewer than 4 pairs.
    """
    if count < 4:
        return -1.0, 1.0
    # A few pairs in perfect order are no certainty: half a step less, where two neighbours in rank that change places
    # are a step (Σd² = 2).
    most = 1 - 6 / (count**3 - count)
    centre = np.arctanh(np.clip(correlation, -most, most))
    reach = _NORMAL_95 * np.sqrt((1 + correlation**2 / 2) / (count - 3))
    return min(float(np.tanh(centre - reach)), correlation), max(float(np.tanh(centre + reach)), correlation)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return mean_rank
