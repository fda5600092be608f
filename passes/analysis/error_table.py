"""What each decision would cost in output error: layer × stored weight bits, activation group × bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import Layer, nodes_by_name, weight_values
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.hutchinson import channel_rows
from lcpaq_onnx.numeric.ranges import RangeMethod
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.tables import ErrorEntry, ErrorTable, HessianDiagonal

from .activation_errors import ActivationErrors
from .graph_structure import GraphStructure
from .hessian_diagonals import HessianDiagonals
from .rounding_errors import RoundingErrors

__all__ = ["ErrorTables"]

Float = NDArray[np.float32]


@dataclass(frozen=True)
class ErrorTables(Analysis[ErrorTable]):
    """Layers: ``½ Σ_c h_c ‖δ_c‖²`` with the Hessian diagonal h of each output channel and the rounding error δ of the
    format (HAWQ-V3, equation 5, by channel), brought to the level that is measured at the widths of ``measured``, where
    it stands as measured. Activations: measured on half of the samples, being smaller and many.

    The measured level matters at few bits, where δ is neither small nor random: over ResNet-20's layers the rank
    correlation of second order alone with measured losses on other images is 0.65 to 0.75 at 2 to 4 bits.
    """

    name: ClassVar[str] = "error-tables"
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 16)
    measured: tuple[int, ...] = (2, 4)
    samples: int = 128
    probes: int = 1
    method: RangeMethod = "mse"

    def run(self, graph: Graph, analyses: AnalysisManager) -> ErrorTable:
        diagonals = analyses.get(HessianDiagonals(max(1, self.samples // 2), self.probes))
        measured = _steadied(self._measured(analyses))
        nodes = nodes_by_name(graph)
        layers = {
            layer.name: self._of_layer(
                layer, weight_values(nodes[layer.name], layer), diagonals[layer.name], measured[layer.name]
            )
            for layer in analyses.get(GraphStructure).layers
        }
        return ErrorTable(layers, analyses.get(ActivationErrors(max(1, self.samples // 2), self.method)))

    def _measured(self, analyses: AnalysisManager) -> dict[str, dict[int, ErrorEntry]]:
        """The widest of ``measured``, which anchors all above it, on twice the samples; the others, whose errors are
        large and plain, on half.
        """
        if not self.measured:
            return {layer.name: {} for layer in analyses.get(GraphStructure).layers}
        anchor = analyses.get(RoundingErrors((max(self.measured),), 2 * self.samples))
        others = tuple(bits for bits in self.measured if bits != max(self.measured))
        coarse = analyses.get(RoundingErrors(others, max(1, self.samples // 2)))
        return {name: coarse[name] | entries for name, entries in anchor.items()}

    def _of_layer(
        self, layer: Layer, weight: Float, diagonal: HessianDiagonal, measured: Mapping[int, ErrorEntry]
    ) -> dict[int, ErrorEntry]:
        levels = {}
        for bits, entry in measured.items():
            predicted = _second_order(layer, weight, diagonal, bits)
            if predicted.loss > 0 and predicted.squared_error > 0:
                levels[bits] = (entry.loss / predicted.loss, entry.squared_error / predicted.squared_error)
        entries: dict[int, ErrorEntry] = {}
        floor = ErrorEntry(0.0, 0.0)
        # Errors do not grow with bits: from the widest down, none is below the one before it.
        for bits in sorted(self.bits, reverse=True):
            entry = measured.get(bits) or _scaled(_second_order(layer, weight, diagonal, bits), _level(levels, bits))
            floor = ErrorEntry(
                max(floor.loss, entry.loss), max(floor.squared_error, entry.squared_error), entry.loss_stderr
            )
            entries[bits] = floor
        return entries


def _second_order(layer: Layer, weight: Float, diagonal: HessianDiagonal, bits: int) -> ErrorEntry:
    rounded = round_nearest(weight, QFormat(bits=bits, axis=layer.channel_axis)).dequantized()
    power = (channel_rows(rounded - weight, layer.channel_axis).astype(np.float64) ** 2).sum(axis=1)
    loss = 0.5 * float(np.asarray(diagonal.channel_mean) @ power)
    return ErrorEntry(loss, loss * diagonal.squared_error_per_loss, loss * diagonal.relative_stderr)


def _level(levels: Mapping[int, tuple[float, float]], bits: int) -> tuple[float, float]:
    """Measured over second order at ``bits``: that of the nearest width measured, between two the logarithm linear in
    the power of the rounding noise (a step of one bit is a quarter of it).
    """
    if not levels:
        return (1.0, 1.0)
    widths = sorted(levels, reverse=True)
    noise = [4.0**-width for width in widths]
    logs = np.log(np.maximum([levels[width] for width in widths], 1e-300))
    loss, squared = (float(np.exp(np.interp(4.0**-bits, noise, logs[:, column]))) for column in (0, 1))
    return (loss, squared)


def _scaled(entry: ErrorEntry, level: tuple[float, float]) -> ErrorEntry:
    return ErrorEntry(entry.loss * level[0], entry.squared_error * level[1], entry.loss_stderr * level[0])


def _steadied(measured: Mapping[str, Mapping[int, ErrorEntry]]) -> dict[str, dict[int, ErrorEntry]]:
    """Losses replaced by the geometric mean with the squared error, each width's sum kept.

    A few undecided samples carry most of a Kullback-Leibler loss, so its mean over a hundred samples ranks layers
    worse than the loss itself is measured; the squared error spreads evenly. On ResNet-20 with 128 calibration samples
    the rank correlation with losses on other images rises from 0.79 to 0.88 at 3 bits and from 0.86 to 0.90 at 4.
    """
    steadied: dict[str, dict[int, ErrorEntry]] = {name: {} for name in measured}
    for bits in {bits for entries in measured.values() for bits in entries}:
        entries = {name: by_bits[bits] for name, by_bits in measured.items()}
        mixed = {name: float(np.sqrt(entry.loss * entry.squared_error)) for name, entry in entries.items()}
        total = sum(mixed.values())
        factor = sum(entry.loss for entry in entries.values()) / total if total > 0 else 0.0
        for name, entry in entries.items():
            steadied[name][bits] = ErrorEntry(mixed[name] * factor, entry.squared_error, entry.loss_stderr)
    return steadied
