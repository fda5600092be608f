"""What rounding one layer's weights to a width does to the output: measured, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.tables import ErrorEntry

from .graph_structure import GraphStructure
from .prober import Probe, Prober
from .rounded_weight import rounding_of

__all__ = ["RoundingErrors", "WeightEntry", "every_entry"]

WeightEntry = tuple[str, int]
"""A layer's name and a stored width."""


@dataclass(frozen=True)
class RoundingErrors(Analysis[dict[WeightEntry, ErrorEntry]]):
    """Error of each of ``entries``, with the rounding that will be applied.

    The rounding error δ is a direction like any other: it adds ``δ∗x`` to the layer's output and what follows runs. At
    few bits it is far from the random directions of a Hessian probe, and large enough for higher orders to matter.
    """

    name: ClassVar[str] = "rounding-errors"
    entries: frozenset[WeightEntry] = frozenset()
    samples: int = 64

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[WeightEntry, ErrorEntry]:
        probes = self.probes(analyses)
        found = Prober(graph, analyses, self.samples).measure(list(probes.values()))
        return {entry: found[probe].entry() for entry, probe in probes.items()}

    def probes(self, analyses: AnalysisManager) -> dict[WeightEntry, Probe]:
        """What ``run`` asks for, in an order of its own."""
        start = {layer.name: layer.raw_output for layer in analyses.get(GraphStructure).layers}
        return {
            (name, bits): Probe(start[name], rounding_of(analyses, name, bits)) for name, bits in sorted(self.entries)
        }


def every_entry(analyses: AnalysisManager, bits: tuple[int, ...]) -> frozenset[WeightEntry]:
    """All layers at all of ``bits``."""
    return frozenset((layer.name, width) for layer in analyses.get(GraphStructure).layers for width in bits)
