"""Finite-difference Hessian diagonals of the teacher loss, per layer and per output channel, by forward passes only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name, weight_values
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.hutchinson import LayerProbe
from lcpaq_onnx.runtime.response import LayerResponse, draws_for
from lcpaq_onnx.runtime.suffix_runner import CachedBatch, OpenSuffix
from lcpaq_onnx.tables import HessianDiagonal

from .graph_structure import GraphStructure
from .suffixes import Suffixes, teacher_of

__all__ = ["HessianDiagonals"]


@dataclass(frozen=True)
class HessianDiagonals(Analysis[dict[str, HessianDiagonal]]):
    """Hessian diagonal of each layer over the first ``samples`` calibration samples, ``probes`` draws a sample.

    A layer's response is linear in its weights: a change ``v`` adds ``v∗x`` to its output, so only the graph behind
    the layer runs, its weights stay constants, and every sample carries a ``v`` of its own.
    """

    name: ClassVar[str] = "hessian-diagonals"
    samples: int = 128
    probes: int = 1

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, HessianDiagonal]:
        layers = analyses.get(GraphStructure).layers
        nodes = nodes_by_name(graph)
        teacher = teacher_of(analyses)
        probes = {
            layer.name: LayerProbe(weight_values(nodes[layer.name], layer), layer.channel_axis, self.samples)
            for layer in layers
        }
        starts, inputs = [layer.raw_output for layer in layers], [layer.input for layer in layers]
        suffixes = Suffixes(graph, analyses, starts, inputs, self.samples)
        by_sample = suffixes.by_sample(inputs)
        random = np.random.default_rng(analyses.inputs.seed)
        with analyses.inputs.progress.track("probing layers", len(layers) * suffixes.round_count) as advance:
            for batches in suffixes.rounds():
                for layer in layers:
                    respond = LayerResponse(layer.op, nodes[layer.name].attrs)
                    behind = suffixes.open(layer.raw_output, teacher)
                    for batch in batches:
                        x, y = batch.floats(layer.input), batch.floats(layer.raw_output)
                        # All rows of a sample move together: its loss is of one change.
                        most = batch.samples if layer.input in by_sample else 1
                        draws = draws_for(most, probes[layer.name].elements)
                        self._probe(probes[layer.name], _Changed(respond, behind, batch, x, y), draws, random)
                    advance(1)
        return {name: probe.estimate() for name, probe in probes.items()}

    def _probe(self, probe: LayerProbe, changed: _Changed, draws: int, random: np.random.Generator) -> None:
        results = [changed.loss(probe.whole(draws, random)) for _ in range(self.probes)]
        probe.add_whole(np.stack([r[0] for r in results]), np.stack([r[1] for r in results]))
        for _ in range(self.probes):
            v, chosen = probe.blocks(draws, random)
            probe.add_blocks(chosen, changed.loss(v)[0])


@dataclass(frozen=True, eq=False)
class _Changed:
    """A layer on one batch: weight change → loss and squared error of each sample."""

    respond: LayerResponse
    behind: OpenSuffix
    batch: CachedBatch
    x: np.ndarray
    y: np.ndarray

    def loss(self, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        result = self.behind.evaluate(self.batch, self.y + self.respond(self.x, v))
        return result.loss, result.squared_error
