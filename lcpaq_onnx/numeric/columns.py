"""Which columns of a layer's input its moments are gathered from. Pure numpy."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.numeric.layer_matrix import LayerMatrix

__all__ = ["MOMENT_BATCH", "MOMENT_SAMPLES", "MOST_MOMENT_SAMPLES", "chosen_columns", "moment_samples"]

MOMENT_BATCH = 8
"""Samples that run together where moments are gathered."""
MOMENT_SAMPLES = 256
"""Calibration samples that moments are taken of, where a sample gives many columns."""
MOST_MOMENT_SAMPLES = 4096
"""Where it gives few."""

# Neighbouring positions of a feature map tell the same: so many columns for each unknown are enough.
_MOST_PER_UNKNOWN = 64
_LEAST_PER_UNKNOWN = 8
_AFFORDABLE = 1 << 14


def moment_samples(columns: Iterable[int]) -> int:
    """How many samples to take moments of; ``columns``: what one sample gives to each layer."""
    return min(MOST_MOMENT_SAMPLES, max(MOMENT_SAMPLES, _AFFORDABLE // max(1, *columns, 1)))


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
