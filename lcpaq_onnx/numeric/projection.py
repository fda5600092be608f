"""Long vectors made short, inner products kept on average. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["projected"]

_SEED = 20_030_401


def projected(rows: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """``rows`` [n, k] as [n, at most ``length``]: unchanged where short enough, else columns with random signs added
    up in ``length`` buckets (count sketch; Charikar, Chen and Farach-Colton 2002). Expected inner products are those of
    ``rows``; their variance is at most 2‖a‖²‖b‖²/length. The same for every call with the same k.
    """
    columns = rows.shape[1]
    if columns <= length:
        return rows
    random = np.random.default_rng((_SEED, columns))
    order = random.permutation(columns)
    signs = random.integers(0, 2, columns) * 2.0 - 1.0
    starts = np.arange(length) * columns // length
    sketch: NDArray[np.float64] = np.add.reduceat((rows * signs)[:, order], starts, axis=1)
    return sketch
