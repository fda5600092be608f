"""Layers, activation groups and operators of the graph, with the types recorded when the model ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import Structure, structure_of
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager

from .recorded_tensors import RecordedTensors

__all__ = ["GraphStructure"]


@dataclass(frozen=True)
class GraphStructure(Analysis[Structure]):
    """What can be quantized: see ``lcpaq_onnx.graph.query``."""

    name: ClassVar[str] = "graph-structure"

    def run(self, graph: Graph, analyses: AnalysisManager) -> Structure:
        recorded = analyses.get(RecordedTensors)
        return structure_of(graph, {name: np.dtype(tensor.dtype) for name, tensor in recorded.items()})
