"""Element type and shape of every tensor, by running the model once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import ClassVar

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.runtime.feeds import Feed
from lcpaq_onnx.tables import RecordedTensor

__all__ = ["RecordedTensors"]

_SEARCHED_SAMPLES = 32


@dataclass(frozen=True)
class RecordedTensors(Analysis[dict[str, RecordedTensor]]):
    """Types and shapes of the top-level tensors on the first calibration sample without an empty input, such as the
    cache of a decoder that has decoded nothing yet; where all of the first few have one, on the first.

    Dynamic shapes need no inference this way. Sequences, maps, optionals and bodies of control flow are left out.
    """

    name: ClassVar[str] = "recorded-tensors"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, RecordedTensor]:
        from lcpaq_onnx.runtime.session import Session, SessionOptions  # loads ONNX Runtime, which planning never needs

        model = to_proto(graph)
        written = [name for node in model.graph.node for name in node.output if name]
        session = Session(with_outputs(model, written), SessionOptions("basic"), base_dir=graph.base_dir)
        feed = _typical(islice(analyses.inputs.samples(), _SEARCHED_SAMPLES))
        values = feed | session.run(feed, [spec.name for spec in session.outputs if spec.is_tensor])
        return {name: RecordedTensor(value.dtype.name, tuple(value.shape)) for name, value in values.items()}


def _typical(feeds: Iterator[Feed]) -> Feed:
    first = next(feeds)
    return next((feed for feed in chain((first,), feeds) if all(array.size for array in feed.values())), first)
