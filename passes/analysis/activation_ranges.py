"""The interval that each activation group's integers cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.ranges import RangeMethod, choose_range, range_candidates
from lcpaq_onnx.runtime.probe import ProbeResult
from lcpaq_onnx.tables import ActivationRange

from .calibration_run import CalibrationRun
from .graph_structure import GraphStructure
from .prober import Probe, Prober
from .quantizing_probes import EIGHT_BITS, QuantizingProbes

__all__ = ["ActivationRanges", "RangeCandidates"]

# Their values end at 1 by nature, so there are no outliers to clip, and what is near the end counts most.
_BOUNDED = ("HardSigmoid", "Sigmoid", "Softmax")


@dataclass(frozen=True)
class RangeCandidates(Analysis[dict[str, tuple[ActivationRange, ...]]]):
    """Ranges of every activation group for an 8-bit format, by their histograms alone; wider formats take all values
    anyway. The first is the one to take unmeasured; only ``auto`` has others.
    """

    name: ClassVar[str] = "range-candidates"
    method: RangeMethod = "mse"
    percentile: float = 99.99

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, tuple[ActivationRange, ...]]:
        histograms = analyses.get(CalibrationRun).histograms
        method = self.method
        if method != "auto":
            return {
                name: (choose_range(histogram, method, EIGHT_BITS, percentile=self.percentile),)
                for name, histogram in histograms.items()
            }
        operators = analyses.get(GraphStructure).operators
        bounded = {name for operator in operators if operator.op in _BOUNDED for name in operator.outputs}
        return {
            name: (choose_range(histogram, "minmax", EIGHT_BITS),)
            if name in bounded
            else range_candidates(histogram, EIGHT_BITS)
            for name, histogram in histograms.items()
        }


@dataclass(frozen=True)
class ActivationRanges(Analysis[dict[str, ActivationRange]]):
    """Range of every activation group by ``method``, for an 8-bit format. Where ``auto`` has candidates, each is
    measured alone on the first ``samples`` calibration samples.
    """

    name: ClassVar[str] = "activation-ranges"
    method: RangeMethod = "mse"
    percentile: float = 99.99
    samples: int = 64

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, ActivationRange]:
        candidates = analyses.get(RangeCandidates(self.method, self.percentile))
        probes = self._probes(graph, analyses)
        # Without a choice there is nothing to open a model for.
        found = Prober(graph, analyses, self.samples).measure(list(probes.values())) if probes else {}
        results = {question: found[probe] for question, probe in probes.items()}
        return {name: _best(name, intervals, results) for name, intervals in candidates.items()}

    def _probes(self, graph: Graph, analyses: AnalysisManager) -> dict[tuple[str, ActivationRange], Probe]:
        probes = QuantizingProbes(graph, analyses)
        candidates = analyses.get(RangeCandidates(self.method, self.percentile))
        return {
            (name, interval): probes.of(name, interval)
            for name, intervals in candidates.items()
            if len(intervals) > 1
            for interval in intervals
        }


def _best(
    group: str, intervals: Sequence[ActivationRange], results: Mapping[tuple[str, ActivationRange], ProbeResult]
) -> ActivationRange:
    """The first, or the one of least squared error among those that are clearly better."""
    if len(intervals) == 1:
        return intervals[0]
    usual = results[group, intervals[0]]
    better = [other for other in intervals[1:] if _is_clearly_better(results[group, other], usual)]
    return min(better, key=lambda one: results[group, one].entry().squared_error, default=intervals[0])


def _is_clearly_better(one: ProbeResult, usual: ProbeResult) -> bool:
    """Squared error lower by more than two standard errors of the difference, and a loss that is not higher.

    A loss such as KL is the doing of the few samples that are undecided, so it alone tells two ranges apart badly; all
    samples have a squared error. But clipping what only confident samples reach moves outputs and no decision, so
    squared error alone is not to be trusted either.
    """
    difference = one.squared_error - usual.squared_error
    if len(difference) < 2 or not np.isfinite(difference).all():
        return False
    stderr = difference.std(ddof=1) / np.sqrt(len(difference))
    return bool(difference.mean() + 2 * stderr < 0 and one.entry().loss <= usual.entry().loss)
