"""How many samples the model takes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.runtime.calibration import is_batchable
from lcpaq_onnx.runtime.session import Session

from .recorded_tensors import RecordedTensors

__all__ = ["BatchSize"]


@dataclass(frozen=True)
class BatchSize(Analysis[int]):
    """1 where samples cannot be stacked; else the power of two, at most ``most``, that keeps a batch's tensors within
    memory.
    """

    name: ClassVar[str] = "batch-size"
    most: int = 32

    def run(self, graph: Graph, analyses: AnalysisManager) -> int:
        session = Session(to_proto(graph), base_dir=graph.base_dir)
        if not is_batchable(session, analyses.inputs.samples()):
            return 1
        sample_bytes = 4 * sum(tensor.elements for tensor in analyses.get(RecordedTensors).values())
        count = max(1, min(self.most, analyses.inputs.resources.batch_bytes // max(1, sample_bytes)))
        # A power of two: a little more or less free memory does not change it, and with it the last digits of results.
        return int(2 ** (count.bit_length() - 1))
