"""Element type and shape of every tensor, by running the model once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.tables import RecordedTensor

__all__ = ["RecordedTensors"]


@dataclass(frozen=True)
class RecordedTensors(Analysis[dict[str, RecordedTensor]]):
    """Types and shapes of the top-level tensors on the first calibration sample.

    Dynamic shapes need no inference this way. Sequences, maps, optionals and bodies of control flow are left out.
    """

    name: ClassVar[str] = "recorded-tensors"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, RecordedTensor]:
        from lcpaq_onnx.runtime.session import Session, SessionOptions  # loads ONNX Runtime, which planning never needs

        model = to_proto(graph)
        written = [name for node in model.graph.node for name in node.output if name]
        session = Session(with_outputs(model, written), SessionOptions("basic"), base_dir=graph.base_dir)
        feed = next(iter(analyses.inputs.samples()))
        values = feed | session.run(feed, [spec.name for spec in session.outputs if spec.is_tensor])
        return {name: RecordedTensor(value.dtype.name, tuple(value.shape)) for name, value in values.items()}
