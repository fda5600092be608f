"""A layer's weight as it will be stored, for measuring what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name, weight_values
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.columns import MOST_MOMENT_SAMPLES
from lcpaq_onnx.numeric.compensated import round_compensated
from lcpaq_onnx.numeric.directions import Rounding
from lcpaq_onnx.numeric.rounding import QuantizedWeight, round_nearest
from lcpaq_onnx.runtime.blas import one_blas_thread
from lcpaq_onnx.tables import Compensable, RoundingMethod

from .calibration_run import CalibrationRun
from .graph_structure import GraphStructure
from .input_moments import InputMoments, LayerMatrices, MomentSamples, wanted_samples
from .memory_timeline import MemoryTimeline

__all__ = ["CompensableLayers", "RoundedWeight", "rounding_of"]

# From here on the nearest integers cost next to nothing, and moments need not be gathered.
_FINE_BITS = 8


@dataclass(frozen=True)
class CompensableLayers(Analysis[Compensable]):
    """Layers whose rounding can be compensated, and from which data ``round-compensated`` does it."""

    name: ClassVar[str] = "compensable-layers"

    def run(self, graph: Graph, analyses: AnalysisManager) -> Compensable:
        steps = analyses.get(MemoryTimeline)
        live_bytes = max((step.fixed_bytes + 4 * sum(step.groups.values()) for step in steps), default=0)
        # The float and the rounded version, side by side.
        affordable = analyses.inputs.resources.carried_bytes // max(1, 2 * live_bytes)
        matrices = analyses.get(LayerMatrices())
        digest = analyses.inputs.samples().take(MOST_MOMENT_SAMPLES).fingerprint()
        # A quarter is left to judge by.
        present = analyses.get(CalibrationRun).samples
        samples = max(1, min(wanted_samples(analyses), affordable, present - present // 4))
        return Compensable(tuple(matrices), digest, samples)


@dataclass(frozen=True)
class RoundedWeight(Analysis[QuantizedWeight]):
    """The weight of ``layer`` at ``bits``. Compensated: by moments of the float model, since what comes before the
    layer is not decided yet.
    """

    name: ClassVar[str] = "rounded-weight"
    layer: str
    bits: int
    method: RoundingMethod = "nearest"

    def run(self, graph: Graph, analyses: AnalysisManager) -> QuantizedWeight:
        layer = next(layer for layer in analyses.get(GraphStructure).layers if layer.name == self.layer)
        weight = weight_values(nodes_by_name(graph)[layer.name], layer)
        format = QFormat(bits=self.bits, axis=layer.channel_axis)
        if self.method == "nearest":
            return round_nearest(weight, format)
        matrix = analyses.get(LayerMatrices())[layer.name]
        moments = analyses.get(InputMoments())[layer.name]
        with one_blas_thread():
            return round_compensated(weight, format, matrix, moments)


def rounding_of(analyses: AnalysisManager, layer: str, bits: int) -> Rounding:
    """How ``layer`` would be rounded to ``bits``."""
    if analyses.inputs.rounding == "nearest" or bits >= _FINE_BITS or layer not in analyses.get(LayerMatrices()):
        return Rounding(bits)
    return Rounding(bits, "compensated", analyses.get(MomentSamples()).sha256)
