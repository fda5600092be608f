"""Roofline rates from measurements: least sum of absolute log ratios, which outliers cannot bend."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lcpaq_onnx.signature import OperatorSignature

__all__ = ["Fit", "Measured", "fit_rates", "median_error"]

Measured = tuple[OperatorSignature, str, float]
"""Signature, executed format, kernel time in microseconds."""
Array = npt.NDArray[np.float64]

_BANDWIDTHS = np.geomspace(2e9, 2e11, 41)
_KERNELS_US = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0)
_RATES = np.geomspace(1e8, 1e12, 241)


@dataclass(frozen=True)
class Fit:
    """Rates of one executed format, as in a target's ``[rates.executed.…]``."""

    kernel_us: float
    bandwidth_bytes_per_s: float
    work_per_s: dict[str, float]

    def predict_us(self, signature: OperatorSignature, executed: str, dispatch_us: float) -> float:
        work_s = signature.work / self.work_per_s[signature.kind]
        traffic_s = signature.bytes(executed) / self.bandwidth_bytes_per_s
        return dispatch_us + self.kernel_us + max(work_s, traffic_s) * 1e6


def fit_rates(measured: Sequence[Measured], dispatch_us: float) -> dict[str, Fit]:
    """Rates of each executed format that occurs, by exhaustive search on logarithmic grids."""
    formats = sorted({executed for _, executed, _ in measured})
    return {name: _fit([row for row in measured if row[1] == name], dispatch_us) for name in formats}


def _fit(measured: Sequence[Measured], dispatch_us: float) -> Fit:
    kinds = sorted({signature.kind for signature, _, _ in measured})
    arrays = {kind: _arrays([row for row in measured if row[0].kind == kind]) for kind in kinds}
    best_loss, best = np.inf, Fit(0.0, 0.0, {})
    for bandwidth, kernel_us in itertools.product(_BANDWIDTHS, _KERNELS_US):
        rates: dict[str, float] = {}
        loss = 0.0
        for kind, (work, traffic, us) in arrays.items():
            bound_us = np.maximum(work[:, None] / _RATES, (traffic / bandwidth)[:, None]) * 1e6
            losses = np.abs(np.log((dispatch_us + kernel_us + bound_us) / us[:, None])).sum(axis=0)
            # Rates beyond which memory always decides tie; the least of them claims least.
            index = int(np.flatnonzero(losses <= losses.min() * (1 + 1e-9))[0])
            rates[kind] = float(f"{_RATES[index]:.2g}")
            loss += float(losses[index])
        if loss < best_loss:
            best_loss, best = loss, Fit(kernel_us, float(f"{bandwidth:.2g}"), rates)
    return best


def _arrays(rows: Sequence[Measured]) -> tuple[Array, Array, Array]:
    return (
        np.array([signature.work for signature, _, _ in rows], np.float64),
        np.array([signature.bytes(executed) for signature, executed, _ in rows], np.float64),
        np.array([latency_us for _, _, latency_us in rows], np.float64),
    )


def median_error(
    measured: Sequence[Measured], predict_us: Callable[[OperatorSignature, str], float]
) -> dict[str, float | int]:
    """Median of |predicted/measured - 1| over all rows, its 90th percentile, the medians of layers and of each kind."""
    errors = np.array([abs(predict_us(signature, executed) / us - 1) for signature, executed, us in measured])
    layers = np.array([signature.macs > 0 for signature, _, _ in measured])
    kinds = np.array([f"{executed} {signature.kind}" for signature, executed, _ in measured])
    return {
        "rows": len(errors),
        "median": round(float(np.median(errors)), 3),
        "p90": round(float(np.quantile(errors, 0.9)), 3),
        "layers": round(float(np.median(errors[layers])), 3) if layers.any() else 0.0,
        **{kind: round(float(np.median(errors[kinds == kind])), 3) for kind in sorted(set(kinds.tolist()))},
    }
