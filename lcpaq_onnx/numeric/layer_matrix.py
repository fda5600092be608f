"""A linear layer as a product of matrices: output = columns · rowsᵀ, for each group of channels. Pure numpy.

A *row* holds the weights of one output channel, a *column* what one of them is multiplied with; convolutions gather
columns under their window (im2col).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["LayerMatrix"]

Float = NDArray[np.float32]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class LayerMatrix:
    """Shapes of one layer: ``groups`` G, ``rows`` M of each, ``columns`` n of each row."""

    op: str
    weight_shape: tuple[int, ...]
    groups: int
    rows: int
    columns: int
    window: _Window | None
    transposed_input: bool = False
    transposed_weight: bool = False

    @classmethod
    def of(cls, op: str, attrs: Mapping[str, object], weight_shape: tuple[int, ...]) -> LayerMatrix | None:
        """For Conv-11, ConvTranspose-11, Gemm-13 and MatMul-13 with a matrix on the right; None for anything else."""
        if op in ("Conv", "ConvTranspose"):
            groups = _integer(attrs, "group", 1)
            window = _Window.of(op, attrs, weight_shape[2:])
            if window is None:
                return None
            taps = math.prod(weight_shape[2:])
            if op == "Conv":
                return cls(op, weight_shape, groups, weight_shape[0] // groups, weight_shape[1] * taps, window)
            return cls(op, weight_shape, groups, weight_shape[1], weight_shape[0] // groups * taps, window)
        if op not in ("Gemm", "MatMul") or len(weight_shape) != 2:
            return None
        flipped = op == "Gemm" and bool(attrs.get("transB", 0))
        inner, outer = weight_shape[::-1] if flipped else weight_shape
        transposed_input = op == "Gemm" and bool(attrs.get("transA", 0))
        return cls(op, weight_shape, 1, outer, inner, None, transposed_input, flipped)

    # ---- weights ----------------------------------------------------------------------------------------------------
    def rows_of(self, weight: NDArray[T]) -> NDArray[T]:
        """[G, M, n] of an array of the weight's shape."""
        if self.op == "Conv":
            return weight.reshape(self.groups, self.rows, self.columns)
        if self.op == "ConvTranspose":
            split = weight.reshape(self.groups, -1, *self.weight_shape[1:])
            return split.swapaxes(1, 2).reshape(self.groups, self.rows, self.columns)
        return (weight if self.transposed_weight else weight.T)[None]

    def weight_of(self, rows: NDArray[T]) -> NDArray[T]:
        """Inverse of ``rows_of``."""
        if self.op == "Conv":
            return rows.reshape(self.weight_shape)
        if self.op == "ConvTranspose":
            inputs = self.weight_shape[0] // self.groups
            split = rows.reshape(self.groups, self.rows, inputs, *self.weight_shape[2:])
            return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(self.weight_shape)
        return rows[0] if self.transposed_weight else np.ascontiguousarray(rows[0].T)

    # ---- inputs -----------------------------------------------------------------------------------------------------
    def column_count(self, shape: tuple[int, ...]) -> int:
        """How many columns an input of ``shape`` gives: one for each position of the output."""
        if self.window is not None:
            return shape[0] * math.prod(self.window.output_extents(shape[2:]))
        return math.prod(shape) // max(1, self.columns)

    def columns_of(self, x: Float, chosen: NDArray[np.intp]) -> Float:
        """[G, len(chosen), n]: the columns with these numbers, counted along the output's positions."""
        if self.window is None:
            flat = (x.T if self.transposed_input else x).reshape(-1, self.columns)
            return np.ascontiguousarray(flat[chosen])[None]
        patches = self.window.patches(x, chosen)
        by_group = patches.reshape(len(chosen), self.groups, self.columns).swapaxes(0, 1)
        return np.ascontiguousarray(by_group)


@dataclass(frozen=True)
class _Window:
    """The sliding window of a convolution over any number of axes. A transposed one is a plain one, backwards, over its
    input with zeros put in between (``spread``) and around.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    spread: tuple[int, ...]
    is_backwards: bool
    is_same: str = ""

    @classmethod
    def of(cls, op: str, attrs: Mapping[str, object], kernel: tuple[int, ...]) -> _Window | None:
        rank = len(kernel)
        ones = (1,) * rank
        strides = _integers(attrs, "strides", ones)
        dilations = _integers(attrs, "dilations", ones)
        pads = _integers(attrs, "pads", (0,) * (2 * rank))
        padding = attrs.get("auto_pad", "NOTSET")
        padding = padding.decode() if isinstance(padding, bytes) else str(padding)
        if op == "Conv":
            is_same = padding if padding.startswith("SAME") else ""
            return cls(kernel, strides, dilations, pads, ones, False, is_same)
        if padding != "NOTSET" or "output_shape" in attrs:
            return None  # where zeros go is then the runtime's choice
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        extra = _integers(attrs, "output_padding", (0,) * rank)
        around = (
            *(r - p for r, p in zip(reach, pads[:rank], strict=True)),
            *(r - p + e for r, p, e in zip(reach, pads[rank:], extra, strict=True)),
        )
        return cls(kernel, ones, dilations, around, strides, True)

    def output_extents(self, extents: tuple[int, ...]) -> tuple[int, ...]:
        padded = [e + a + b for e, (a, b) in zip(self._spread_extents(extents), self._around(extents), strict=True)]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]
        return tuple(max(0, (p - r) // s + 1) for p, r, s in zip(padded, reach, self.strides, strict=True))

    def patches(self, x: Float, chosen: NDArray[np.intp]) -> Float:
        """[len(chosen), C, *kernel]."""
        rank = len(self.kernel)
        extents = x.shape[2:]
        if self.spread != (1,) * rank:
            wide = np.zeros((*x.shape[:2], *self._spread_extents(extents)), x.dtype)
            wide[_spatial(slice(None, None, s) for s in self.spread)] = x
            x = wide
        around = self._around(extents)
        # Negative padding of a transposed convolution takes away.
        x = x[_spatial(slice(max(0, -a), x.shape[2 + i] - max(0, -b)) for i, (a, b) in enumerate(around))]
        x = np.pad(x, [(0, 0), (0, 0), *((max(0, a), max(0, b)) for a, b in around)])
        reach = tuple(d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True))
        axes = tuple(range(2, 2 + rank))
        windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
        windows = windows[_spatial(slice(None, None, step) for step in (*self.strides, *self.dilations))]
        if self.is_backwards:
            windows = np.flip(windows, axis=tuple(range(2 + rank, 2 + 2 * rank)))
        sample, *place = np.unravel_index(chosen, (windows.shape[0], *windows.shape[2 : 2 + rank]))
        by_position = np.moveaxis(windows, 1, 1 + rank)
        picked: Float = by_position[(sample, *place)]
        return picked

    def _spread_extents(self, extents: tuple[int, ...]) -> tuple[int, ...]:
        return tuple((e - 1) * s + 1 for e, s in zip(extents, self.spread, strict=True))

    def _around(self, extents: tuple[int, ...]) -> list[tuple[int, int]]:
        rank = len(self.kernel)
        if not self.is_same:
            return list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        around = []
        for e, k, s, d in zip(extents, self.kernel, self.strides, self.dilations, strict=True):
            total = max(0, (-(-e // s) - 1) * s + d * (k - 1) + 1 - e)
            less, more = total // 2, total - total // 2
            around.append((less, more) if self.is_same == "SAME_UPPER" else (more, less))
        return around


def _spatial(slices: Iterable[slice]) -> tuple[slice, ...]:
    """``slices`` behind the axes of samples and channels."""
    return (slice(None), slice(None), *slices)


def _integer(attrs: Mapping[str, object], name: str, default: int) -> int:
    value = attrs.get(name, default)
    assert isinstance(value, int)
    return value


def _integers(attrs: Mapping[str, object], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = attrs.get(name)
    if value is None:
        return default
    assert isinstance(value, list | tuple)
    return tuple(int(v) for v in value)
