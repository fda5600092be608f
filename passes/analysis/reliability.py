"""Whether more samples would still change the ranking of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.ranking import rank_correlation

from .prober import Prober
from .rounding_errors import RoundingErrors, WeightEntry

__all__ = ["Reliability", "split_half_reliability"]

_FEWEST_ENTRIES = 4


@dataclass(frozen=True)
class Reliability(Analysis[float]):
    """Split-half reliability of the measured errors of ``entries``, each over the sum of its width: whether every other
    sample ranks them as the rest does. From 0 to 1; 1 where there is nothing to rank or no more samples than asked for.
    """

    name: ClassVar[str] = "reliability"
    entries: frozenset[WeightEntry] = frozenset()
    samples: int = 64

    def run(self, graph: Graph, analyses: AnalysisManager) -> float:
        prober = Prober(graph, analyses, self.samples)
        probes = RoundingErrors(self.entries, self.samples).probes(analyses)
        found = prober.measure(list(probes.values()))
        if prober.samples < self.samples:
            return 1.0
        return split_half_reliability({entry: found[probe].loss for entry, probe in probes.items()})


def split_half_reliability(losses: Mapping[WeightEntry, NDArray[np.float64]]) -> float:
    """The rank correlation of two halves of the samples, stepped up to the whole by Spearman's and Brown's formula."""
    if len(losses) < _FEWEST_ENTRIES or min(len(loss) for loss in losses.values()) < 2:
        return 1.0
    halves = []
    for first in (0, 1):
        means = {entry: float(loss[first::2].mean()) for entry, loss in losses.items()}
        widths = {width for _, width in means}
        of_width = {width: sum(mean for (_, own), mean in means.items() if own == width) for width in widths}
        halves.append([mean / (of_width[width] or 1.0) for (_, width), mean in means.items()])
    correlation = rank_correlation(*halves)
    if np.isnan(correlation):
        return 1.0
    return 2 * correlation / (1 + correlation) if correlation > 0 else 0.0
