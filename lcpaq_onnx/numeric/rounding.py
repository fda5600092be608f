"""Rounding a float tensor to integers: scales and nearest integers, vectorised over channels. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.formats import QFormat

__all__ = [
    "QuantizedWeight",
    "activation_parameters",
    "can_saturate",
    "fake_quantize",
    "mse_scales",
    "round_nearest",
    "spread_scale",
]

Float = NDArray[np.float32]

# Ratios of the clipping range to the largest magnitude. Below 0.3 even 2-bit weights lose more by clipping than they
# gain in resolution; the second grid refines around the best of the first.
_COARSE = np.linspace(0.3, 1.0, 15, dtype=np.float32)
_FINE = np.linspace(-0.045, 0.045, 7, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Integers and the affine map back: ``values ≈ (integers - 0) * scale``, scale along the format's axis."""

    integers: NDArray[np.int8] | NDArray[np.int16]
    scale: Float
    """Shape ``format.scale_shape`` of the integers': [channels], or [] for one scale; block-wise the integers' shape
    with the axis divided by the block (ceiling), as DequantizeLinear-21 wants it."""
    format: QFormat

    def dequantized(self) -> Float:
        """Float32 values, shape of the integers."""
        return self.integers.astype(np.float32) * spread_scale(self.scale, self.format, self.integers.shape)


def spread_scale(scale: Float, format: QFormat, shape: tuple[int, ...]) -> Float:
    """``scale`` in a shape that broadcasts against a tensor of ``shape``."""
    if format.axis is None:
        return scale
    if format.block is not None:
        return np.repeat(scale, format.block, axis=format.axis).take(range(shape[format.axis]), axis=format.axis)
    along = [1] * len(shape)
    along[format.axis] = -1
    return scale.reshape(along)


def _rows(values: Float, format: QFormat) -> Float:
    """[scales, elements that share one] view or copy; one row without an axis. A last short block is filled with 0,
    which every symmetric format holds exactly.
    """
    if format.axis is None:
        return values.reshape(1, -1)
    if format.block is None:
        return np.ascontiguousarray(np.moveaxis(values, format.axis, 0)).reshape(values.shape[format.axis], -1)
    last = np.moveaxis(values, format.axis, -1)
    missing = -last.shape[-1] % format.block
    padded = np.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(padded).reshape(-1, format.block)


def _of_rows(scale: Float, format: QFormat, shape: tuple[int, ...]) -> Float:
    """One scale for each of ``_rows`` in the shape that the format asks for. ``shape``: the values'."""
    if format.axis is None or format.block is None:
        return scale.reshape(format.scale_shape(shape))
    others = [size for place, size in enumerate(shape) if place != format.axis % len(shape)]
    return np.ascontiguousarray(np.moveaxis(scale.reshape(*others, -1), -1, format.axis))


def mse_scales(values: Float, format: QFormat) -> Float:
    """Scale of each channel, or block, that minimises the squared rounding error over a grid of clipping ranges.

    At 8 bits and more the largest magnitude is within 1 % of that optimum and is taken as it is. An all-zero channel
    gets scale 1. Returns shape ``format.scale_shape`` of the values'.
    """
    rows = _rows(values, format)
    largest = np.abs(rows).max(axis=1)
    is_zero = largest == 0
    largest = np.where(is_zero, np.float32(format.qmax), largest)
    ratio = np.ones_like(largest)
    if format.bits < 8:
        # In units of the largest magnitude, so that squares of any finite weights neither overflow nor vanish.
        unit_rows = (rows / largest[:, None]).astype(np.float32)
        for grid in (_COARSE, _FINE):
            candidates = grid[:, None] if grid is _COARSE else np.clip(ratio + grid[:, None], 0.05, 1.05)
            candidates = np.broadcast_to(candidates, (len(grid), len(largest)))
            scales = (candidates / format.qmax).astype(np.float32)
            errors = np.stack([_squared_error(unit_rows, scale, format) for scale in scales])
            ratio = np.take_along_axis(candidates, errors.argmin(axis=0)[None], axis=0)[0]
        ratio = np.where(is_zero, np.float32(1), ratio)
    scale = (largest / format.qmax * ratio).astype(np.float32)
    # A subnormal scale would overflow its own reciprocal in kernels.
    return _of_rows(np.maximum(scale, np.finfo(np.float32).tiny), format, values.shape)


def _squared_error(rows: Float, scale: Float, format: QFormat) -> Float:
    scale = scale[:, None]
    work = rows / scale
    np.rint(work, out=work)
    np.clip(work, format.qmin, format.qmax, out=work)
    work *= scale
    work -= rows
    error: Float = np.einsum("ij,ij->i", work, work)
    return error


def round_nearest(values: Float, format: QFormat, scale: Float | None = None) -> QuantizedWeight:
    """Nearest integers of a symmetric ``format`` (ONNX QuantizeLinear: ties to even, saturating).

    ``scale``: as ``mse_scales`` returns it, which is the default.
    """
    scale = mse_scales(values, format) if scale is None else scale
    integers = np.rint(values / spread_scale(scale, format, values.shape))
    np.clip(integers, format.qmin, format.qmax, out=integers)
    return QuantizedWeight(integers.astype(np.int8 if format.bits <= 8 else np.int16), scale, format)


def can_saturate(weight: QuantizedWeight) -> bool:
    """Whether some pair of products with 8-bit unsigned activations can leave 16 bits: 255·(|w₁| + |w₂|) > 32767.

    Which weights meet in a pair depends on the kernel's layout, so the two largest of a channel are taken.
    """
    rows = np.abs(_rows(weight.integers.astype(np.float32), weight.format))
    largest = np.sort(rows, axis=1)[:, -2:].sum(axis=1)
    return bool((255 * largest > np.iinfo(np.int16).max).any())


def activation_parameters(low: float, high: float, format: QFormat) -> tuple[np.float32, int]:
    """Scale and zero point of one tensor that cover [low, high] widened to hold 0 (so that padding is exact)."""
    low, high = min(low, 0.0), max(high, 0.0)
    if format.symmetric:
        low, high = -max(-low, high), max(-low, high)
        scale = np.float32(high / format.qmax)
        return (scale if scale > 0 else np.float32(1.0)), 0
    scale = np.float32((high - low) / (format.qmax - format.qmin))
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1.0), format.qmin if not format.signed else 0
    return scale, int(np.clip(np.rint(format.qmin - low / float(scale)), format.qmin, format.qmax))


def fake_quantize(values: Float, scale: np.float32, zero_point: int, format: QFormat) -> Float:
    """QuantizeLinear followed by DequantizeLinear (ONNX opset 21 semantics), in float32."""
    with np.errstate(over="ignore"):  # saturates below
        work = np.array(values / scale)  # an array also where numpy would make a scalar of a 0-d one
    np.rint(work, out=work)
    work += zero_point
    np.clip(work, format.qmin, format.qmax, out=work)
    work -= zero_point
    work *= scale
    return work
