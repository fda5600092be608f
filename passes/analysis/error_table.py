"""What each decision would cost in output error: layer × stored weight bits, activation group × bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.formats import LayerFormat, QFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.ops import sums_over_rows
from lcpaq_onnx.graph.query import Layer, nodes_by_name, weight_values
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.hutchinson import channel_rows
from lcpaq_onnx.numeric.ranges import RangeMethod
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.numeric.shrinkage import Observed, shrunk
from lcpaq_onnx.tables import ErrorEntry, ErrorTable, HessianDiagonal

from .activation_errors import ActivationErrors
from .graph_structure import GraphStructure
from .hessian_diagonals import HessianDiagonals
from .prober import Prober
from .rounding_errors import RoundingErrors, WeightEntry

__all__ = ["WEIGHT_BITS", "BlockShares", "ErrorTables", "RoundingPower"]

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
"""Stored widths that an error table has."""

# What runtimes multiply in blocks.
_BLOCK = 32
_BLOCK_BITS = (2, 4, 8)


@dataclass(frozen=True)
class RoundingPower(Analysis[dict[str, NDArray[np.float64]]]):
    """Layer → [channels, widths]: squared rounding error of each output channel at each of ``WEIGHT_BITS``."""

    name: ClassVar[str] = "rounding-power"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, NDArray[np.float64]]:
        nodes = nodes_by_name(graph)
        return {
            layer.name: np.stack([_power(layer, weight_values(nodes[layer.name], layer), b) for b in WEIGHT_BITS], 1)
            for layer in analyses.get(GraphStructure).layers
        }


@dataclass(frozen=True)
class BlockShares(Analysis[dict[str, dict[str, float]]]):
    """Layer → ``w4b32`` → squared rounding error in blocks of rows of a matrix [K, N], over that per channel."""

    name: ClassVar[str] = "block-shares"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, dict[str, float]]:
        nodes = nodes_by_name(graph)
        shares: dict[str, dict[str, float]] = {}
        for layer in analyses.get(GraphStructure).layers:
            node = nodes[layer.name]
            if not sums_over_rows(node.op, node.attrs, layer.weight_shape):
                continue
            weight = weight_values(node, layer)
            shares[layer.name] = {LayerFormat(bits, block=_BLOCK).stored: _share(weight, bits) for bits in _BLOCK_BITS}
        return shares


def _share(weight: NDArray[np.float32], bits: int) -> float:
    formats = (QFormat(bits=bits, axis=0, block=_BLOCK), QFormat(bits=bits, axis=1))
    blocks, channels = (float(((round_nearest(weight, f).dequantized() - weight) ** 2).sum()) for f in formats)
    return min(1.0, blocks / channels) if channels > 0 else 1.0


@dataclass(frozen=True)
class ErrorTables(Analysis[ErrorTable]):
    """Layers: ``½ Σ_c h_c ‖δ_c‖²`` with the Hessian diagonal h of each output channel and the rounding error δ of the
    format (HAWQ-V3, equation 5, by channel), brought together with what was measured at ``entries`` (``shrunk``).
    Activations: measured.
    """

    name: ClassVar[str] = "error-tables"
    entries: frozenset[WeightEntry] = frozenset()
    samples: int = 64
    probes: int = 1
    channel_probes: int = 0
    method: RangeMethod = "mse"

    def run(self, graph: Graph, analyses: AnalysisManager) -> ErrorTable:
        diagonals = HessianDiagonals(self.samples, self.probes, self.channel_probes)
        measured = RoundingErrors(self.entries, self.samples)
        activations = ActivationErrors(self.samples, self.method)
        # Asked for together, so that every suffix is opened once.
        requests = [
            *diagonals.requests(analyses),
            *measured.probes(analyses).values(),
            *activations.requests(graph, analyses),
        ]
        Prober(graph, analyses, self.samples).measure(requests)
        layers = [layer.name for layer in analyses.get(GraphStructure).layers]
        power = analyses.get(RoundingPower())
        curvature, errors = analyses.get(diagonals), analyses.get(measured)
        table = _layer_errors(layers, power, curvature, errors)
        return ErrorTable(table, analyses.get(activations), analyses.get(BlockShares()))


def _layer_errors(
    layers: list[str],
    power: Mapping[str, NDArray[np.float64]],
    diagonals: Mapping[str, HessianDiagonal],
    measured: Mapping[WeightEntry, ErrorEntry],
) -> dict[str, dict[int, ErrorEntry]]:
    if not layers:
        return {}
    loss = np.stack([0.5 * np.asarray(diagonals[name].channel_mean) @ power[name] for name in layers])
    squared = loss * np.array([[diagonals[name].squared_error_per_loss] for name in layers])
    relative = np.array([diagonals[name].relative_stderr for name in layers])
    found = [[measured.get((name, bits)) for bits in WEIGHT_BITS] for name in layers]
    stderr = np.array([[np.nan if e is None else e.loss_stderr / max(e.loss, 1e-300) for e in row] for row in found])
    losses = np.array([[np.nan if e is None else e.loss for e in row] for row in found])
    squares = np.array([[np.nan if e is None else e.squared_error for e in row] for row in found])
    loss = shrunk(loss, relative, Observed(losses, stderr))
    squared = shrunk(squared, relative, Observed(squares, stderr))
    # Errors do not grow with bits: from the widest down, none is below the one before it.
    loss, squared = (np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1] for table in (loss, squared))
    table: dict[str, dict[int, ErrorEntry]] = {}
    for row, name in enumerate(layers):
        table[name] = {}
        for column, bits in enumerate(WEIGHT_BITS):
            entry = found[row][column]
            value = float(loss[row, column])
            noise = value * relative[row] if entry is None else entry.loss_stderr
            table[name][bits] = ErrorEntry(value, float(squared[row, column]), float(noise))
    return table


def _power(layer: Layer, weight: NDArray[np.float32], bits: int) -> NDArray[np.float64]:
    rounded = round_nearest(weight, QFormat(bits=bits, axis=layer.channel_axis)).dequantized()
    result: NDArray[np.float64] = (channel_rows(rounded - weight, layer.channel_axis).astype(np.float64) ** 2).sum(1)
    return result
