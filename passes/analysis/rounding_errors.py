"""What rounding one layer's weights to a width does to the output: measured, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name, weight_values
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.runtime.response import LayerResponse
from lcpaq_onnx.runtime.suffix_runner import ChangeLoss, joined
from lcpaq_onnx.tables import ErrorEntry

from .graph_structure import GraphStructure
from .suffixes import Suffixes, teacher_of

__all__ = ["RoundingErrors"]


@dataclass(frozen=True)
class RoundingErrors(Analysis[dict[str, dict[int, ErrorEntry]]]):
    """Layer → width → error, with the rounding that ``round-weights`` applies.

    The rounding error δ is a direction like any other: it adds ``δ∗x`` to the layer's output and what follows runs. At
    few bits it is far from the random directions of a Hessian probe, and large enough for higher orders to matter.
    """

    name: ClassVar[str] = "rounding-errors"
    bits: tuple[int, ...] = (2, 3, 4)
    samples: int = 128

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, dict[int, ErrorEntry]]:
        layers = analyses.get(GraphStructure).layers
        nodes = nodes_by_name(graph)
        teacher = teacher_of(analyses)
        starts, inputs = [layer.raw_output for layer in layers], [layer.input for layer in layers]
        suffixes = Suffixes(graph, analyses, starts, inputs, self.samples)
        results: dict[tuple[str, int], list[ChangeLoss]] = {
            (layer.name, bits): [] for layer in layers for bits in self.bits
        }
        with analyses.inputs.progress.track("rounding layers", len(layers) * suffixes.round_count) as advance:
            for batches in suffixes.rounds():
                for layer in layers:
                    weight = weight_values(nodes[layer.name], layer)
                    respond = LayerResponse(layer.op, nodes[layer.name].attrs)
                    behind = suffixes.open(layer.raw_output, teacher)
                    for bits in self.bits:
                        rounded = round_nearest(weight, QFormat(bits=bits, axis=layer.channel_axis)).dequantized()
                        error = (rounded - weight)[None]
                        for batch in batches:
                            moved = batch.floats(layer.raw_output) + respond(batch.floats(layer.input), error)
                            results[layer.name, bits].append(behind.evaluate(batch, moved))
                    advance(1)
        return {layer.name: {bits: joined(results[layer.name, bits]).entry() for bits in self.bits} for layer in layers}
