"""Directions in which one tensor is moved to see what the output does: random signs, real rounding errors.

Values: equal directions give equal figures, and their ``repr`` is part of the keys under which results are stored.
Pure numpy.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.numeric.hutchinson import LayerProbe
from lcpaq_onnx.numeric.rounding import fake_quantize
from lcpaq_onnx.tables import RoundingMethod

__all__ = ["BlockSigns", "Direction", "Quantizing", "RandomDirection", "Rounding", "Signs", "WeightDirection"]

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Rounding:
    """The rounding error of a layer's weights at ``bits``. ``data_sha256``: of the samples whose moments compensated
    rounding looked at.
    """

    bits: int
    method: RoundingMethod = "nearest"
    data_sha256: str = ""


@dataclass(frozen=True)
class Signs:
    """Hutchinson probe number ``index`` of a layer: random signs, another draw for every sample."""

    seed: int
    index: int

    def draws(self, probe: LayerProbe, layer: str, samples: Sequence[int]) -> Float:
        """[len(samples), *weight shape]; ``samples``: their numbers in the data. The same whatever else is drawn."""
        return probe.whole(_generators(self.seed, f"{layer} {self.index}", samples))


@dataclass(frozen=True)
class BlockSigns:
    """As ``Signs``, but each draw moves one of ``count`` blocks of output channels; samples take them in turns."""

    seed: int
    index: int
    count: int

    def draws(self, probe: LayerProbe, layer: str, samples: Sequence[int]) -> Float:
        """As ``Signs.draws``."""
        generators = _generators(self.seed, f"{layer} blocks {self.index}", samples)
        return probe.block(generators, self.chosen(samples), self.count)

    def chosen(self, samples: Sequence[int] | NDArray[np.intp]) -> NDArray[np.intp]:
        """Block of each sample's draw; with every probe a sample meets the next."""
        number = np.asarray(samples, np.intp)
        # Each round of blocks starts one further on: batches that share their first sample's draw meet others, too.
        return (number + number // self.count + self.index) % self.count


@dataclass(frozen=True)
class Quantizing:
    """QuantizeLinear and DequantizeLinear of the activation ``tensor``."""

    tensor: str
    scale: float
    zero_point: int
    format: QFormat

    def changed(self, values: Float) -> Float:
        """Shape of ``values``."""
        return fake_quantize(values, np.float32(self.scale), self.zero_point, self.format)


RandomDirection = Signs | BlockSigns
WeightDirection = Rounding | Signs | BlockSigns
Direction = Rounding | Signs | BlockSigns | Quantizing


def _generators(seed: int, stream: str, samples: Sequence[int]) -> list[np.random.Generator]:
    """One for each sample, so that batches and order do not matter."""
    word = zlib.crc32(stream.encode())
    return [np.random.default_rng((seed, word, sample)) for sample in samples]
