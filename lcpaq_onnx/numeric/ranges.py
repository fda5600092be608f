"""Choosing the interval an activation's integers cover, from a histogram that is gathered in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.numeric.rounding import activation_parameters
from lcpaq_onnx.tables import ActivationRange

__all__ = ["HistogramMethod", "RangeMethod", "StreamingHistogram", "choose_range", "range_candidates"]

HistogramMethod = Literal["minmax", "percentile", "mse", "entropy"]
"""What a histogram alone can answer."""
RangeMethod = Literal["auto", "minmax", "percentile", "mse", "entropy"]
"""``auto``: the one of ``range_candidates`` that the output prefers, tensor by tensor."""

_BINS = 2048
# Values counted per batch and tensor. Minimum and maximum are exact; the shape of a distribution is known from far
# fewer values than a feature map has, and counting all of them would cost more than running the model.
_SAMPLED_VALUES = 1 << 15
# Ratio of steps from which the output is asked: below, rounding errors (squared) differ by less than 1.7 times.
_OTHER_STEP = 1.3
_ALTERNATIVES: tuple[HistogramMethod, ...] = ("minmax", "percentile")


class StreamingHistogram:
    """Histogram of a stream whose range is not known beforehand: bins double in width when a value falls outside.

    Memory is constant. ``minimum`` and ``maximum`` are exact, counts are of an evenly strided subset of each batch.
    """

    def __init__(self) -> None:
        self.minimum = np.inf
        self.maximum = -np.inf
        self.counts: NDArray[np.float64] = np.zeros(_BINS)
        self._low = 0.0
        self._width = 0.0

    def update(self, values: NDArray[np.float32]) -> None:
        """Count one batch of any shape; empty ones are ignored. Values must be finite."""
        if not values.size:
            return
        flat = values.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._cover(low, high)
        # An odd stride does not fall in step with channels-last layouts or rows of even length.
        stride = max(1, flat.size // _SAMPLED_VALUES) | 1
        sampled = flat[::stride]
        if self._width == 0.0:
            self.counts[0] += sampled.size
            return
        index = ((sampled - np.float32(self._low)) * np.float32(1 / self._width)).astype(np.int32)
        np.clip(index, 0, _BINS - 1, out=index)
        np.add(self.counts, np.bincount(index, minlength=_BINS), out=self.counts)

    @property
    def centers(self) -> NDArray[np.float64]:
        """Middle of each bin."""
        return np.asarray(self._low + (np.arange(_BINS) + 0.5) * self._width, np.float64)

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins until [low, high] lies inside. Counts move to the bins that hold their centers."""
        if self._width == 0.0:
            constant = self.counts[0]
            first, self._low = self._low if constant else low, min(low, self._low if constant else low)
            top = max(high, first)
            width = (top - self._low) / _BINS
            # Narrower bins have no float32 reciprocal; such a stream is as good as constant.
            self._width = width if width >= np.finfo(np.float32).tiny else 0.0
            if constant and self._width:
                self.counts[:] = 0
                self.counts[min(int((first - self._low) / self._width), _BINS - 1)] = constant
            return
        while low < self._low or high > self._low + _BINS * self._width:
            folded: NDArray[np.float64] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(_BINS)
            half = _BINS // 2
            if low < self._low:
                self._low -= _BINS * self._width
                self.counts[half:] = folded
            else:
                self.counts[:half] = folded
            self._width *= 2


@dataclass(frozen=True)
class _Candidate:
    low: float
    high: float


_Cost: TypeAlias = Callable[[StreamingHistogram, _Candidate, QFormat], float]


def choose_range(
    histogram: StreamingHistogram, method: HistogramMethod, format: QFormat, *, percentile: float = 99.99
) -> ActivationRange:
    """The interval [low, high] for ``format``.

    ``minmax``: all values. ``percentile``: the central ``percentile`` per cent (both tails share the rest).
    ``mse``: least expected squared error of rounding and clipping over the histogram. ``entropy``: least
    Kullback-Leibler divergence between the histogram and its quantized self (Migacz, GTC 2017).
    """
    low, high = float(histogram.minimum), float(histogram.maximum)
    if not histogram.counts.any():
        return ActivationRange(0.0, 0.0, 0.0, 0.0, "never observed")
    chosen = _Candidate(low, high)
    if method == "percentile":
        chosen = _percentile(histogram, percentile)
    elif method == "mse":
        chosen = _best(histogram, format, _squared_error)
    elif method == "entropy":
        chosen = _best(histogram, format, _divergence)
    label = f"percentile {percentile:g}" if method == "percentile" else method
    return ActivationRange(max(chosen.low, low), min(chosen.high, high), low, high, label)


def range_candidates(histogram: StreamingHistogram, format: QFormat) -> tuple[ActivationRange, ...]:
    """Ranges worth measuring: ``mse`` first, then ``minmax`` and ``percentile`` where their steps are of another size
    by 30 %. Mostly there is one; outliers make it more, and what they are worth only the output knows.
    """
    kept = [choose_range(histogram, "mse", format)]
    for method in _ALTERNATIVES:
        other = choose_range(histogram, method, format)
        ratios = [_step(other, format) / _step(one, format) for one in kept]
        if all(max(ratio, 1 / ratio) > _OTHER_STEP for ratio in ratios):
            kept.append(other)
    return tuple(kept)


def _step(interval: ActivationRange, format: QFormat) -> float:
    return float(activation_parameters(interval.low, interval.high, format)[0])


def _percentile(histogram: StreamingHistogram, percentile: float) -> _Candidate:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (1 - percentile / 100) / 2
    centers = histogram.centers
    return _Candidate(float(centers[np.searchsorted(share, tail)]), float(centers[np.searchsorted(share, 1 - tail)]))


def _best(histogram: StreamingHistogram, format: QFormat, cost: _Cost) -> _Candidate:
    """Least cost over clipped intervals: first both ends together, then each end on its own around the best."""
    low, high = float(histogram.minimum), float(histogram.maximum)
    low_end, high_end = min(low, 0.0), max(high, 0.0)
    candidates = [_Candidate(low_end * r, high_end * r) for r in _SHRINK]
    best = min(candidates, key=lambda c: cost(histogram, c, format))
    if low_end < 0 < high_end and not format.symmetric:
        ends = [_Candidate(best.low * a, best.high * b) for a in _AROUND for b in _AROUND]
        best = min(ends, key=lambda c: cost(histogram, c, format))
    return best


# Both ends shrunk together, then each end around the best.
_SHRINK = tuple(float(r) for r in np.linspace(1.0, 0.25, 31))
_AROUND = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)


def _quantized(histogram: StreamingHistogram, candidate: _Candidate, format: QFormat) -> NDArray[np.float64]:
    scale, zero_point = activation_parameters(candidate.low, candidate.high, format)
    q = np.clip(np.rint(histogram.centers / float(scale)) + zero_point, format.qmin, format.qmax)
    values: NDArray[np.float64] = (q - zero_point) * float(scale)
    return values


def _squared_error(histogram: StreamingHistogram, candidate: _Candidate, format: QFormat) -> float:
    difference = _quantized(histogram, candidate, format) - histogram.centers
    return float(histogram.counts @ difference**2)


def _divergence(histogram: StreamingHistogram, candidate: _Candidate, format: QFormat) -> float:
    """KL of the histogram from the histogram of its quantized values, spread evenly over the bins of each level."""
    from scipy import special  # a tenth of a second that other methods need not pay

    levels, inverse = np.unique(_quantized(histogram, candidate, format), return_inverse=True)
    used = histogram.counts > 0
    mass = np.bincount(inverse, weights=histogram.counts, minlength=len(levels))
    bins = np.bincount(inverse, weights=used, minlength=len(levels))
    spread = np.where(used, mass[inverse] / np.maximum(bins[inverse], 1), 0.0)
    total = histogram.counts.sum()
    # Clipped mass lands on the last level; without its own bins there the divergence must not be free.
    inside = (histogram.centers >= candidate.low) & (histogram.centers <= candidate.high)
    reference = np.where(inside, histogram.counts, 0.0)
    edges = np.flatnonzero(inside)
    if not edges.size:
        return float("inf")
    reference[edges[0]] += histogram.counts[: edges[0]].sum()
    reference[edges[-1]] += histogram.counts[edges[-1] + 1 :].sum()
    spread = np.where(inside, spread, 0.0)
    spread = spread / max(spread.sum(), 1e-300)
    return float(special.rel_entr(reference / total, np.maximum(spread, 1e-12)).sum())
