"""Finite-difference Hessian diagonals of the teacher loss, per layer and per output channel, by forward passes only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import Layer, nodes_by_name, weight_values
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.directions import BlockSigns, RandomDirection, Signs
from lcpaq_onnx.numeric.hutchinson import LayerProbe, ProbeLosses
from lcpaq_onnx.tables import HessianDiagonal

from .graph_structure import GraphStructure
from .prober import Probe, Prober

__all__ = ["HessianDiagonals"]

# With 32 samples each block is probed by two of them.
_MOST_BLOCKS = 16


@dataclass(frozen=True)
class HessianDiagonals(Analysis[dict[str, HessianDiagonal]]):
    """Hessian diagonal of each layer over the first ``samples`` calibration samples: ``probes`` draws a sample for the
    layer as a whole, ``channel_probes`` for how it is shared out over the output channels (0: evenly).
    """

    name: ClassVar[str] = "hessian-diagonals"
    samples: int = 64
    probes: int = 1
    channel_probes: int = 1

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, HessianDiagonal]:
        layers = analyses.get(GraphStructure).layers
        nodes = nodes_by_name(graph)
        found = Prober(graph, analyses, self.samples).measure(self.requests(analyses))
        diagonals = {}
        for layer in layers:
            whole = [found[Probe(layer.raw_output, d)] for d in self._whole(analyses)]
            directions = self._blocks(layer, analyses)
            blocks = [found[Probe(layer.raw_output, d)] for d in directions]
            losses = ProbeLosses(
                loss=np.stack([result.loss for result in whole]),
                squared_error=np.stack([result.squared_error for result in whole]),
                block_loss=np.array([result.loss for result in blocks]),
                block=np.array([d.chosen(r.draw) for d, r in zip(directions, blocks, strict=True)], np.intp),
            )
            probe = LayerProbe(weight_values(nodes[layer.name], layer), layer.channel_axis)
            diagonals[layer.name] = probe.diagonal(losses, _block_count(layer))
        return diagonals

    def requests(self, analyses: AnalysisManager) -> list[Probe]:
        """What ``run`` asks for."""
        layers = analyses.get(GraphStructure).layers
        return [
            Probe(layer.raw_output, direction) for layer in layers for direction in self._directions(layer, analyses)
        ]

    def _directions(self, layer: Layer, analyses: AnalysisManager) -> list[RandomDirection]:
        return [*self._whole(analyses), *self._blocks(layer, analyses)]

    def _whole(self, analyses: AnalysisManager) -> list[Signs]:
        return [Signs(analyses.inputs.seed, index) for index in range(self.probes)]

    def _blocks(self, layer: Layer, analyses: AnalysisManager) -> list[BlockSigns]:
        count = _block_count(layer)
        return [BlockSigns(analyses.inputs.seed, index, count) for index in range(self.channel_probes)]


def _block_count(layer: Layer) -> int:
    channels = 1 if layer.channel_axis is None else layer.weight_shape[layer.channel_axis]
    return min(channels, _MOST_BLOCKS)
