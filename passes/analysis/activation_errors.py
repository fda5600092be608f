"""What quantizing one activation group does to the output: measured, group by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.ranges import RangeMethod
from lcpaq_onnx.numeric.rounding import activation_parameters, fake_quantize
from lcpaq_onnx.runtime.suffix_runner import ChangeLoss, joined
from lcpaq_onnx.tables import ErrorEntry

from .activation_ranges import ActivationRanges
from .suffixes import Suffixes, teacher_of

__all__ = ["ActivationErrors"]

_EIGHT = QFormat(bits=8, signed=False, symmetric=False)


@dataclass(frozen=True)
class ActivationErrors(Analysis[dict[str, dict[int, ErrorEntry]]]):
    """Group → bits → error: its first tensor is replaced by its quantized self (8 bit, the chosen range) and what
    follows runs. 16 bits follow from the 8-bit error by the square of the step.
    """

    name: ClassVar[str] = "activation-errors"
    samples: int = 128
    method: RangeMethod = "mse"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, dict[int, ErrorEntry]]:
        ranges = analyses.get(ActivationRanges(self.method))
        teacher = teacher_of(analyses)
        suffixes = Suffixes(graph, analyses, list(ranges), [], self.samples)
        results: dict[str, list[ChangeLoss]] = {name: [] for name in ranges}
        with analyses.inputs.progress.track("quantizing activations", len(ranges) * suffixes.round_count) as advance:
            for batches in suffixes.rounds():
                for name, interval in ranges.items():
                    scale, zero_point = activation_parameters(interval.low, interval.high, _EIGHT)
                    behind = suffixes.open(name, teacher)
                    for batch in batches:
                        changed = fake_quantize(batch.floats(name), scale, zero_point, _EIGHT)
                        results[name].append(behind.evaluate(batch, changed))
                    advance(1)
        return {name: _by_bits(joined(parts).entry()) for name, parts in results.items()}


def _by_bits(eight: ErrorEntry) -> dict[int, ErrorEntry]:
    finer = ((2**8 - 1) / (2**16 - 1)) ** 2
    return {8: eight, 16: ErrorEntry(eight.loss * finer, eight.squared_error * finer, eight.loss_stderr * finer)}
