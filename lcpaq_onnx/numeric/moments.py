"""Second moments of what a layer multiplies its weights with, gathered in a stream of columns. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["MomentStream", "Moments"]

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over columns: x of the float model, z the same column in the model that is rounded so far.

    ``second`` [G, n, n]: E[z zᵀ]; ``cross`` [G, n, n]: E[x zᵀ], None where z is x; ``mean`` [G, n]: E[z];
    ``float_mean`` [G, n]: E[x]. ``count``: columns seen.
    """

    second: Float
    cross: Float | None
    mean: Float
    float_mean: Float
    count: int

    def centered(self) -> Moments:
        """Of what is left when the means are taken away: for a layer whose bias makes up for them."""
        second = self.second - self.mean[:, :, None] * self.mean[:, None, :]
        cross = None if self.cross is None else self.cross - self.float_mean[:, :, None] * self.mean[:, None, :]
        return Moments(second, cross, np.zeros_like(self.mean), np.zeros_like(self.float_mean), self.count)


class MomentStream:
    """Adds up columns. Sums of float32 products; a batch's own sum is float32, so no batch drowns in those before."""

    def __init__(self, groups: int, columns: int, *, has_changed_inputs: bool) -> None:
        square = (groups, columns, columns)
        self._second = np.zeros(square, np.float32)
        self._cross = np.zeros(square, np.float32) if has_changed_inputs else None
        self._sum = np.zeros((groups, columns), np.float64)
        self._float_sum = np.zeros((groups, columns), np.float64)
        self._count = 0

    def update(self, x: Float, z: Float) -> None:
        """``x``, ``z`` [G, columns, n] of the float and of the rounded model; the same array where they are equal."""
        if len(z) == 1:
            self._second[0] += z[0].T @ z[0]  # a matrix by itself is symmetric: BLAS does half the products
        else:
            self._second += z.swapaxes(1, 2) @ z
        self._sum += z.sum(axis=1, dtype=np.float64)
        if self._cross is not None:
            self._cross += x.swapaxes(1, 2) @ z
            self._float_sum += x.sum(axis=1, dtype=np.float64)
        self._count += z.shape[1]

    def result(self) -> Moments:
        """Moments so far; zero where nothing was seen."""
        share = np.float32(1 / max(1, self._count))
        mean = (self._sum * share).astype(np.float32)
        return Moments(
            second=cast(Float, self._second * share),
            cross=None if self._cross is None else cast(Float, self._cross * share),
            mean=mean,
            float_mean=mean if self._cross is None else (self._float_sum * share).astype(np.float32),
            count=self._count,
        )
