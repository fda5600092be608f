"""Where output and input channels lie in the weight of a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

__all__ = ["WeightAxes", "weight_axes"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WeightAxes:
    """``shape`` of the weight; ``groups``: output and input channels fall into as many, which do not meet.

    ``output_axis``: axis of ``shape``, 0 or 1, that runs over output channels; the other one runs over input channels.
    With groups, axis 0 runs over the channels of all groups, axis 1 over those of one.
    """

    shape: tuple[int, ...]
    groups: int
    output_axis: int

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self._channels(self.output_axis)

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self._channels(1 - self.output_axis)

    @property
    def kernel(self) -> int:
        """Number of weights between one input and one output channel."""
        return math.prod(self.shape[2:])

    def along_outputs(self, scale: Floats) -> Floats:
        """``scale`` [outputs] in a shape that multiplies the weight."""
        return self._along(scale, self.output_axis)

    def along_inputs(self, scale: Floats) -> Floats:
        """``scale`` [inputs] in a shape that multiplies the weight."""
        return self._along(scale, 1 - self.output_axis)

    def magnitudes(self, weight: NDArray[Any]) -> Floats:
        """Largest magnitude of every kernel, float64 [groups, outputs / groups, inputs / groups]."""
        kernel = tuple(range(2, weight.ndim))
        return self._matrix(np.abs(weight).max(axis=kernel) if kernel else np.abs(weight))

    def squares(self, weight: NDArray[Any]) -> Floats:
        """Sum of squares of every kernel, float64 [groups, outputs / groups, inputs / groups]."""
        squares = np.square(weight, dtype=np.float64)
        return self._matrix(squares.sum(axis=tuple(range(2, weight.ndim))))

    def _matrix(self, kernels: NDArray[Any]) -> Floats:
        matrix: Floats = kernels.astype(np.float64).reshape(self.groups, -1, self.shape[1])
        return matrix if self.output_axis == 0 else matrix.swapaxes(1, 2)

    def _channels(self, axis: int) -> int:
        return self.shape[0] if axis == 0 else self.shape[1] * self.groups

    def _along(self, scale: Floats, axis: int) -> Floats:
        trailing = [1] * (len(self.shape) - 2)
        if axis == 0:
            return scale.reshape(-1, 1, *trailing)
        if self.groups == 1:
            return scale.reshape(1, -1, *trailing)
        by_group = np.repeat(scale.reshape(self.groups, -1), self.shape[0] // self.groups, axis=0)
        return by_group.reshape(*by_group.shape, *trailing)


def weight_axes(node: gs.Node, shape: tuple[int, ...]) -> WeightAxes | None:
    """Axes of a weight of ``shape`` of the layer ``node``; None for a MatMul by more than a matrix.

    Conv-11: [M, C/g, k…]. ConvTranspose-11: [C, M/g, k…]. Gemm-13: [K, N], transposed [N, K]. MatMul-13: [K, N].
    """
    if node.op in ("Conv", "ConvTranspose"):
        return WeightAxes(shape, int(node.attrs.get("group", 1)), 0 if node.op == "Conv" else 1)
    if len(shape) != 2:
        return None
    return WeightAxes(shape, 1, 0 if node.attrs.get("transB", 0) else 1)
