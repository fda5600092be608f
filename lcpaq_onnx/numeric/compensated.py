"""Rounding that makes up for its own errors: each weight is rounded knowing what was lost on those before it.

The error of a layer's output is (t - ŵ) H (t - ŵ)ᵀ for each row w of weights, with the second moment H of what the row
is multiplied with. Columns are rounded one after the other, and what a column loses moves into those not yet rounded
(Frantar et al. 2023, GPTQ, algorithm 1); then single weights are rounded again as long as that lowers the error
(coordinate descent). Where the input has already changed, the target t is what the float layer would have to be to give
its own output from the changed input. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.numeric.layer_matrix import LayerMatrix
from lcpaq_onnx.numeric.moments import Moments
from lcpaq_onnx.numeric.rounding import QuantizedWeight, mse_scales, round_nearest, spread_scale

__all__ = ["round_compensated"]

Float = NDArray[np.float32]
T = TypeVar("T", bound=np.generic)

# Of the scale of least squared error: compensated errors like other scales than lone ones.
_SCALE_FACTORS = (0.82, 0.88, 0.94, 1.0, 1.06, 1.12, 1.18)
_SWEEPS = 2
_BLOCK = 64
_LEAST_DAMPING, _MOST_DAMPING = 0.01, 0.1
# Of the mean square: below that, what is left about the means is rounding of float32.
_LEAST_SPREAD = 1e-6


def round_compensated(
    weight: Float,
    format: QFormat,
    matrix: LayerMatrix,
    moments: Moments,
    *,
    least_scale: Float | None = None,
    damping: float | None = None,
) -> QuantizedWeight:
    """Integers of a symmetric ``format`` of at most 8 bits for ``weight``, which ``matrix`` describes.

    ``moments``: of the layer's input; those about the means where the bias makes up for means. ``least_scale``: as the
    scale, or a scalar; what it may not fall below. ``damping``: added to the diagonal of the second moment, of its
    mean; None: a hundredth, and up to a tenth where there are few columns. Moments that overflowed: nearest integers.
    """
    base = mse_scales(weight, format)
    if not np.isfinite(moments.second).all():
        return round_nearest(weight, format, _at_least(base, least_scale))
    if damping is None:
        damping = min(_MOST_DAMPING, max(_LEAST_DAMPING, _MOST_DAMPING * matrix.columns / max(1, moments.count)))
    problem = _Problem.of(matrix.rows_of(weight), moments, damping)

    def laid_out(scale: Float) -> Float:
        """The scale of every weight, in the layout of the problem."""
        whole = np.broadcast_to(spread_scale(scale, format, matrix.weight_shape), matrix.weight_shape)
        return problem.ordered(matrix.rows_of(whole))

    factors = np.asarray(_SCALE_FACTORS if format.bits < 8 else (1.0,), np.float32)
    scales = np.stack([_at_least(base * factor, least_scale) for factor in factors])
    candidates = problem.rounded([laid_out(scale) for scale in scales], format)
    errors = candidates.errors
    if format.axis is None:
        errors = np.broadcast_to(errors.sum(axis=(1, 2), keepdims=True), errors.shape)
    best = errors.argmin(axis=0)
    integers = np.take_along_axis(candidates.integers, best[None, :, None, :], axis=0)[0]
    scale = _picked(scales, best, format)
    chosen = problem.descended(_Rounded(integers, laid_out(scale)), format)
    if format.bits < 8:
        scale = _at_least(_times(scale, problem.fitted(chosen.values), format), least_scale)
        chosen = problem.descended(_Rounded(chosen.integers, laid_out(scale)), format)
    integers = matrix.weight_of(problem.rows(chosen.integers))
    return QuantizedWeight(integers.astype(np.int8), scale, format)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """``integers`` [F, G, n, M] for F scales, and the ``errors`` [F, G, M] of their rows."""

    integers: Float
    errors: Float


@dataclass(frozen=True, eq=False)
class _Rounded:
    """``integers`` and the scale of each, in the layout of a problem."""

    integers: Float
    scale: Float

    @property
    def values(self) -> Float:
        return self.integers * self.scale


@dataclass(frozen=True, eq=False)
class _Problem:
    """Arrays lie column by column, [G, n, M], in ``order`` [G, n]: what matters most is rounded first.

    ``target`` of the rows; ``second`` [G, n, n] and ``upper``, the factor U of its inverse UᵀU.
    """

    target: Float
    second: Float
    upper: Float
    order: NDArray[np.intp]

    @classmethod
    def of(cls, rows: Float, moments: Moments, damping: float) -> _Problem:
        """``rows`` [G, M, n]."""
        second = moments.second.copy()
        diagonal = np.maximum(np.einsum("gii->gi", moments.second), 0)
        added = np.maximum(damping * diagonal.mean(axis=1), _LEAST_SPREAD * moments.power)[:, None]
        np.einsum("gii->gi", second)[:] = diagonal + np.where(added > 0, added, 1.0)
        order = np.argsort(-diagonal, axis=1, kind="stable")
        second = _permuted(second, order)
        upper = np.stack([_upper_factor(matrix) for matrix in second])
        target = np.take_along_axis(rows.swapaxes(1, 2), order[:, :, None], axis=1)
        if moments.cross is not None:
            change = _permuted(moments.cross - moments.second, order)
            target = target + upper.swapaxes(1, 2) @ (upper @ (change.swapaxes(1, 2) @ target))
        return cls(target, second, upper, order)

    def rounded(self, scales: Sequence[Float], format: QFormat) -> _Candidates:
        """Rounded column by column, once for each of ``scales``, which are laid out like the target. What the columns
        lose, in units of the factor's diagonal, is the error of the row.
        """
        # All at once: they are but more rows.
        scale = np.concatenate(scales, axis=2)
        work = np.tile(self.target, (1, 1, len(scales)))
        integers, errors = np.empty_like(work), np.zeros((len(work), work.shape[2]), np.float32)
        columns = work.shape[1]
        for first in range(0, columns, _BLOCK):
            end = min(first + _BLOCK, columns)
            lost = np.empty((len(work), end - first, work.shape[2]), np.float32)
            for j in range(first, end):
                rounded = np.clip(np.rint(work[:, j] / scale[:, j]), format.qmin, format.qmax)
                error = (work[:, j] - rounded * scale[:, j]) / self.upper[:, j, j, None]
                work[:, j + 1 : end] -= self.upper[:, j, j + 1 : end, None] * error[:, None]
                integers[:, j], lost[:, j - first] = rounded, error
            work[:, end:] -= self.upper[:, first:end, end:].swapaxes(1, 2) @ lost
            errors += np.einsum("gnm,gnm->gm", lost, lost)
        count = len(scales)
        return _Candidates(np.stack(np.split(integers, count, axis=2)), np.stack(np.split(errors, count, axis=1)))

    def descended(self, start: _Rounded, format: QFormat) -> _Rounded:
        """``start`` after rounding each weight again, given all others, a few times over."""
        now, step = start.integers.copy(), start.scale
        slope = self.second @ (self.target - start.values)
        diagonal = np.einsum("gii->gi", self.second)
        columns = now.shape[1]
        for _ in range(_SWEEPS):
            before = now.copy()
            for first in range(0, columns, _BLOCK):
                end = min(first + _BLOCK, columns)
                local, moved = slope[:, first:end].copy(), np.empty(now[:, first:end].shape, np.float32)
                for j in range(first, end):
                    wanted = now[:, j] + local[:, j - first] / (diagonal[:, j, None] * step[:, j])
                    rounded = np.clip(np.rint(wanted), format.qmin, format.qmax)
                    move = (rounded - now[:, j]) * step[:, j]
                    local -= self.second[:, j, first:end, None] * move[:, None]
                    now[:, j], moved[:, j - first] = rounded, move
                slope -= self.second[:, :, first:end] @ moved
            if np.array_equal(now, before):
                break
        return _Rounded(now, step)

    def fitted(self, values: Float) -> Float:
        """[G, M]: what to multiply each row of ``values`` with for the least error."""
        weighted = self.second @ values
        power = np.einsum("gnm,gnm->gm", weighted, values)
        agreement = np.einsum("gnm,gnm->gm", weighted, self.target)
        is_usable = (power > 0) & (agreement > 0)
        return np.where(is_usable, agreement / np.where(power > 0, power, 1), 1).astype(np.float32)

    def ordered(self, rows: Float) -> Float:
        """``rows`` [G, M, n] of the weight in the layout of the problem."""
        return np.take_along_axis(rows.swapaxes(1, 2), self.order[:, :, None], axis=1)

    def rows(self, values: NDArray[T]) -> NDArray[T]:
        """Inverse of ``ordered``."""
        restored = np.take_along_axis(values, np.argsort(self.order, axis=1)[:, :, None], axis=1)
        return restored.swapaxes(1, 2)


def _permuted(matrices: Float, order: NDArray[np.intp]) -> Float:
    rows = np.take_along_axis(matrices, order[:, :, None], axis=1)
    return np.take_along_axis(rows, order[:, None, :], axis=2)


def _upper_factor(matrix: Float) -> Float:
    """U with matrix⁻¹ = UᵀU: the inverse of R, where matrix = R Rᵀ and both are upper triangular."""
    from scipy.linalg import lapack  # a tenth of a second that other roundings need not pay

    # Backwards the upper factor is the lower one, which LAPACK makes.
    backwards, more = matrix[::-1, ::-1].astype(np.float64), 0.0
    lower, failed = lapack.dpotrf(backwards, lower=1)
    while failed:  # not positive definite by float32's rounding of its entries
        more = 10 * more or 1e-6 * float(np.trace(backwards)) / len(backwards)
        lower, failed = lapack.dpotrf(backwards + more * np.eye(len(backwards)), lower=1)
    inverse, _ = lapack.dtrtri(lower[::-1, ::-1], lower=0)
    upper: Float = np.triu(inverse).astype(np.float32)
    return upper


# ---- scales ---------------------------------------------------------------------------------------------------------
def _at_least(scale: Float, least: Float | None) -> Float:
    return scale if least is None else np.maximum(scale, least)


def _picked(scales: Float, best: NDArray[np.intp], format: QFormat) -> Float:
    """From ``scales`` [F, *scale shape] those that ``best`` [G, M] names for each row."""
    if format.axis is None:
        only: Float = scales[best.flat[0]]
        return only
    flat = best.reshape(-1)
    # Blocks lie along the columns of a product, scales of a row in the last axis.
    each: Float = np.take_along_axis(scales, flat[(None,) * (scales.ndim - 1)], axis=0)[0]
    return each


def _times(scale: Float, factor: Float, format: QFormat) -> Float:
    if format.axis is None:
        return scale
    return scale * factor.reshape(-1)
