"""Second moments of what a layer multiplies its weights with, gathered in a stream of columns. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MomentStream", "Moments"]

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over columns: x of the float model, z the same column in the model that is rounded so far.

    ``second`` [G, n, n]: E[z zᵀ]; ``cross`` [G, n, n]: E[x zᵀ], None where z is x; both about the means, where the
    layer's bias makes up for these. ``mean`` [G, n]: E[z]; ``float_mean`` [G, n]: E[x]. ``power`` [G]: mean square of
    z. ``count``: columns seen.
    """

    second: Float
    cross: Float | None
    mean: Float
    float_mean: Float
    power: Float
    count: int


class MomentStream:
    """Adds up columns in float32, about the means of the first batch: means that are large beside the spread would
    leave nothing of it.
    """

    def __init__(self, groups: int, columns: int, *, has_changed_inputs: bool) -> None:
        square = (groups, columns, columns)
        self._second = np.zeros(square, np.float32)
        self._cross = np.zeros(square, np.float32) if has_changed_inputs else None
        self._origin, self._float_origin = (np.zeros((groups, columns), np.float32) for _ in range(2))
        self._sum, self._float_sum = (np.zeros((groups, columns), np.float64) for _ in range(2))
        self._count = 0

    def update(self, x: Float, z: Float) -> None:
        """``x``, ``z`` [G, columns, n] of the float and of the rounded model; the same array where they are equal."""
        if not z.shape[1]:
            return
        if not self._count:
            self._origin, self._float_origin = z.mean(axis=1), x.mean(axis=1)
        z = z - self._origin[:, None]
        if len(z) == 1:
            self._second[0] += z[0].T @ z[0]  # a matrix by itself is symmetric: BLAS does half the products
        else:
            self._second += z.swapaxes(1, 2) @ z
        self._sum += z.sum(axis=1, dtype=np.float64)
        if self._cross is not None:
            x = x - self._float_origin[:, None]
            self._cross += x.swapaxes(1, 2) @ z
            self._float_sum += x.sum(axis=1, dtype=np.float64)
        self._count += z.shape[1]

    def result(self) -> Moments:
        """About zero; all zero where nothing was seen."""
        return self._moments(self._origin, self._float_origin)

    def centered(self) -> Moments:
        """About the means."""
        count = max(1, self._count)
        return self._moments(-(self._sum / count), -(self._float_sum / count))

    def _moments(self, offset: NDArray[np.floating], float_offset: NDArray[np.floating]) -> Moments:
        """Of what was added up and ``offset``."""
        count = max(1, self._count)
        mean, float_mean = self._sum / count, self._float_sum / count
        own, other = offset.astype(np.float32), float_offset.astype(np.float32)
        step, float_step = mean.astype(np.float32), float_mean.astype(np.float32)
        second = self._second / np.float32(count) + _outer(own, step) + _outer(step, own) + _outer(own, own)
        cross = None
        if self._cross is not None:
            cross = self._cross / np.float32(count) + _outer(other, step) + _outer(float_step, own)
            cross = cross + _outer(other, own)
        z_mean = (mean + self._origin).astype(np.float32)
        spread = np.einsum("gii->g", self._second) / count - (mean**2).sum(axis=1)
        power = (spread + (z_mean.astype(np.float64) ** 2).sum(axis=1)) / max(1, mean.shape[1])
        return Moments(
            second=second,
            cross=cross,
            mean=z_mean,
            float_mean=z_mean if cross is None else (float_mean + self._float_origin).astype(np.float32),
            power=np.maximum(power, 0).astype(np.float32),
            count=self._count,
        )


def _outer(a: Float, b: Float) -> Float:
    product: Float = a[:, :, None] * b[:, None, :]
    return product
