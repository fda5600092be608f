"""Probes of activation groups: their first tensor replaced by its 8-bit self."""

from __future__ import annotations

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.directions import Quantizing
from lcpaq_onnx.numeric.rounding import activation_parameters
from lcpaq_onnx.tables import ActivationRange

from .graph_structure import GraphStructure
from .prober import Probe

__all__ = ["EIGHT_BITS", "QuantizingProbes"]

EIGHT_BITS = QFormat(bits=8, signed=False, symmetric=False)
"""The format that ranges are chosen and errors of activations are measured for."""
# f(f(x)) = f(x), and a quantized value stays what it is: put in before the function it comes out behind it.
_IDEMPOTENT = ("Relu", "Clip")


class QuantizingProbes:
    """What to ask of a ``Prober`` for an activation group in a range."""

    def __init__(self, graph: Graph, analyses: AnalysisManager) -> None:
        nodes = nodes_by_name(graph)
        # Behind a layer's own Relu the probe can start at the layer's output, where its weights are probed anyway.
        self._starts = {
            layer.output: layer.raw_output
            for layer in analyses.get(GraphStructure).layers
            if layer.output != layer.raw_output and nodes[layer.name].outputs[0].outputs[0].op in _IDEMPOTENT
        }

    def of(self, group: str, interval: ActivationRange) -> Probe:
        """The probe that quantizes ``group`` to integers over ``interval``."""
        scale, zero_point = activation_parameters(interval.low, interval.high, EIGHT_BITS)
        return Probe(self._starts.get(group, group), Quantizing(group, float(scale), zero_point, EIGHT_BITS))
