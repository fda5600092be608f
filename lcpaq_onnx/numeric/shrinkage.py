"""Measured errors steadied by what is known besides: second order, and the same layer at other widths. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Observed", "shrunk"]

Double = NDArray[np.float64]
Bool = NDArray[np.bool_]

_LEAST = 1e-300
# Relative errors below it are not believed: samples of one data set are alike.
_LEAST_VARIANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Observed:
    """Errors [layers, widths], nan where nothing was measured, with their standard errors relative to them."""

    value: Double
    relative_stderr: Double


def shrunk(predicted: Double, relative_stderr: Double, measured: Observed) -> Double:
    """Errors [layers, widths] from second-order predictions (``relative_stderr``: [layers]) and what was measured.

    In logarithms, measured − predicted is taken apart into what the width adds (all layers: second order fails in the
    same way), what the layer adds (all its widths: its curvature, seen again), and the entry's own rest. The rest holds
    the noise of few samples, which is to go, and how this rounding error happens to lie to the curvature, which is to
    stay: the more of it is kept the further it stands out of its noise (layers of few weights have single rounding
    errors far off any curvature). The prediction counts as one more observation of the layer. Entries predicted as 0
    stay 0.
    """
    known = np.isfinite(measured.value) & (measured.value > 0) & (predicted > 0)
    base = np.log(np.maximum(predicted, _LEAST))
    found = np.log(np.maximum(np.where(known, measured.value, 1.0), _LEAST))
    ratio = np.where(known, found - base, 0.0)
    noise = np.where(known, np.maximum(np.nan_to_num(measured.relative_stderr) ** 2, _LEAST_VARIANCE), 0.0)
    of_width = _of_width(ratio, known)
    rest = np.where(known, ratio - of_width, 0.0)
    squares = np.where(known, (rest - _mean(rest, known, 1)[:, None]) ** 2, 0.0).sum()
    spread = float(squares / max(1, int((known.sum(axis=1) - 1).clip(0).sum())))
    true_spread = max(spread - float(_mean(noise, known)), _LEAST_VARIANCE)
    precision = np.where(known, 1 / (noise + true_spread), 0.0)
    prior = 1 / (np.maximum(relative_stderr**2, _LEAST_VARIANCE) + true_spread)
    of_layer = ((rest * precision).sum(axis=1) / (precision.sum(axis=1) + prior))[:, None]
    own = np.where(known, rest - of_layer, 0.0)
    own *= np.divide(own**2, own**2 + noise, out=np.zeros_like(own), where=noise > 0)
    combined = np.where(predicted > 0, np.exp(base + of_width + of_layer + own), 0.0)
    # What has no logarithm says nothing of other entries, and is as it is.
    extreme = ~known & ~np.isnan(measured.value)
    return np.where(extreme, measured.value, combined)


def _of_width(ratio: Double, known: Bool) -> Double:
    """[widths]: mean ratio of each width's measured layers; between and beyond measured widths that of the nearest."""
    places = np.flatnonzero(known.any(axis=0))
    if not places.size:
        return np.zeros(ratio.shape[1])
    interpolated: Double = np.interp(np.arange(ratio.shape[1]), places, _mean(ratio, known, 0)[places])
    return interpolated


def _mean(values: Double, known: Bool, axis: int | None = None) -> Double:
    """Over known entries; 0 where there are none."""
    total: Double = np.where(known, values, 0.0).sum(axis=axis) / np.maximum(1, known.sum(axis=axis))
    return total
