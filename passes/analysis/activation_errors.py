"""What quantizing one activation group does to the output: measured, group by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.directions import Quantizing
from lcpaq_onnx.numeric.ranges import RangeMethod
from lcpaq_onnx.numeric.rounding import activation_parameters
from lcpaq_onnx.tables import ErrorEntry

from .activation_ranges import ActivationRanges
from .graph_structure import GraphStructure
from .prober import Probe, Prober

__all__ = ["ActivationErrors"]

_EIGHT = QFormat(bits=8, signed=False, symmetric=False)
# f(f(x)) = f(x), and a quantized value stays what it is: put in before the function it comes out behind it.
_IDEMPOTENT = ("Relu", "Clip")


@dataclass(frozen=True)
class ActivationErrors(Analysis[dict[str, dict[int, ErrorEntry]]]):
    """Group → bits → error: its first tensor is replaced by its quantized self (8 bit, the chosen range) and what
    follows runs. 16 bits follow from the 8-bit error by the square of the step.
    """

    name: ClassVar[str] = "activation-errors"
    samples: int = 64
    method: RangeMethod = "mse"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, dict[int, ErrorEntry]]:
        probes = self.probes(graph, analyses)
        found = Prober(graph, analyses, self.samples).measure(list(probes.values()))
        return {name: _by_bits(found[probe].entry()) for name, probe in probes.items()}

    def probes(self, graph: Graph, analyses: AnalysisManager) -> dict[str, Probe]:
        """What ``run`` asks for, by group."""
        nodes = nodes_by_name(graph)
        # Behind a layer's own Relu the probe can start at the layer's output, where its weights are probed anyway.
        layers = analyses.get(GraphStructure).layers
        shared = {
            layer.output: layer.raw_output
            for layer in layers
            if layer.output != layer.raw_output and nodes[layer.name].outputs[0].outputs[0].op in _IDEMPOTENT
        }
        probes = {}
        for name, interval in analyses.get(ActivationRanges(self.method)).items():
            scale, zero_point = activation_parameters(interval.low, interval.high, _EIGHT)
            direction = Quantizing(name, float(scale), zero_point, _EIGHT)
            probes[name] = Probe(shared.get(name, name), direction)
        return probes


def _by_bits(eight: ErrorEntry) -> dict[int, ErrorEntry]:
    finer = ((2**8 - 1) / (2**16 - 1)) ** 2
    return {8: eight, 16: ErrorEntry(eight.loss * finer, eight.squared_error * finer, eight.loss_stderr * finer)}
