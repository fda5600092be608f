"""What quantizing one activation group does to the output: measured, group by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.ranges import RangeMethod
from lcpaq_onnx.tables import ErrorEntry

from .activation_ranges import ActivationRanges, RangeCandidates
from .prober import Probe, Prober
from .quantizing_probes import QuantizingProbes

__all__ = ["ActivationErrors"]


@dataclass(frozen=True)
class ActivationErrors(Analysis[dict[str, dict[int, ErrorEntry]]]):
    """Group → bits → error: its first tensor is replaced by its quantized self (8 bit, the chosen range) and what
    follows runs. 16 bits follow from the 8-bit error by the square of the step.
    """

    name: ClassVar[str] = "activation-errors"
    samples: int = 64
    method: RangeMethod = "mse"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, dict[int, ErrorEntry]]:
        # Ranges are among the answers; asked for together, every suffix is opened once.
        Prober(graph, analyses, self.samples).measure(self.requests(graph, analyses))
        probes = self.probes(graph, analyses)
        found = Prober(graph, analyses, self.samples).measure(list(probes.values()))
        return {name: _by_bits(found[probe].entry()) for name, probe in probes.items()}

    def requests(self, graph: Graph, analyses: AnalysisManager) -> list[Probe]:
        """What ``run`` asks for: every range that may be chosen."""
        probes = QuantizingProbes(graph, analyses)
        candidates = analyses.get(RangeCandidates(self.method))
        return [probes.of(name, interval) for name, intervals in candidates.items() for interval in intervals]

    def probes(self, graph: Graph, analyses: AnalysisManager) -> dict[str, Probe]:
        """Of each group, in the chosen range."""
        probes = QuantizingProbes(graph, analyses)
        ranges = analyses.get(ActivationRanges(self.method, samples=self.samples))
        return {name: probes.of(name, interval) for name, interval in ranges.items()}


def _by_bits(eight: ErrorEntry) -> dict[int, ErrorEntry]:
    finer = ((2**8 - 1) / (2**16 - 1)) ** 2
    return {8: eight, 16: ErrorEntry(eight.loss * finer, eight.squared_error * finer, eight.loss_stderr * finer)}
