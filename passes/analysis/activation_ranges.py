"""The interval that each activation group's integers cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.ranges import RangeMethod, choose_range
from lcpaq_onnx.tables import ActivationRange

from .calibration_run import CalibrationRun

__all__ = ["ActivationRanges"]


@dataclass(frozen=True)
class ActivationRanges(Analysis[dict[str, ActivationRange]]):
    """Range of every activation group by ``method``, for an 8-bit format; wider formats take all values anyway."""

    name: ClassVar[str] = "activation-ranges"
    method: RangeMethod = "mse"
    percentile: float = 99.99

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, ActivationRange]:
        eight = QFormat(bits=8, signed=False, symmetric=False)
        histograms = analyses.get(CalibrationRun).histograms
        return {
            name: choose_range(histogram, self.method, eight, percentile=self.percentile)
            for name, histogram in histograms.items()
        }
