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

_FEWEST_LAYERS = 4


@dataclass(frozen=True)
class Reliability(Analysis[float]):
    """Split-half reliability of the measured errors of ``entries``: whether every other sample ranks the layers of a
    width as the rest does. From 0 to 1; 1 where there is nothing to rank, or the data end before ``samples``.
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
    """The rank correlation of two halves of the samples, mean over the widths that at least 4 layers have, by number of
    layers, stepped up to the whole by Spearman's and Brown's formula.
    """
    by_width: dict[int, list[NDArray[np.float64]]] = {}
    for (_, width), loss in losses.items():
        by_width.setdefault(width, []).append(loss)
    found = []
    for rows in by_width.values():
        if len(rows) < _FEWEST_LAYERS or len(rows[0]) < 2:
            continue
        first, second = ([float(row[start::2].mean()) for row in rows] for start in (0, 1))
        correlation = rank_correlation(first, second)
        if not np.isnan(correlation):
            found.append((correlation, len(rows)))
    if not found:
        return 1.0
    mean = sum(correlation * count for correlation, count in found) / sum(count for _, count in found)
    return 2 * mean / (1 + mean) if mean > 0 else 0.0
