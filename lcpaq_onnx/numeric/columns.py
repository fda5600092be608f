"""Which columns of a layer's input its moments are gathered from. Pure numpy."""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.numeric.layer_matrix import LayerMatrix

__all__ = ["MOMENT_SAMPLES", "chosen_columns"]

MOMENT_SAMPLES = 256
"""Calibration samples that moments are taken of: the first ones."""

# Neighbouring positions of a feature map tell the same: so many columns for each unknown are enough.
_MOST_PER_UNKNOWN = 64
_LEAST_PER_UNKNOWN = 8
_AFFORDABLE = 1 << 14


def chosen_columns(
    matrix: LayerMatrix, layer: str, shape: tuple[int, ...], batch: int, share: float
) -> NDArray[np.intp]:
    """Numbers of the columns to take from a layer's input of ``shape``, which is batch number ``batch`` and ``share``
    of all. Drawn by name and number: the same in every run.
    """
    n = matrix.columns
    wanted = min(_MOST_PER_UNKNOWN * n, max(_AFFORDABLE, _LEAST_PER_UNKNOWN * n))
    present = matrix.column_count(shape)
    count = math.ceil(wanted * share)
    if count >= present:
        return np.arange(present)
    random = np.random.default_rng((zlib.crc32(layer.encode()), batch))
    return np.sort(random.choice(present, count, replace=False, shuffle=False))
