"""Which activations are alive at every step of a schedule."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import numpy as np

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import dataflow, nodes_by_name, reads
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.tables import LiveStep

from .graph_structure import GraphStructure
from .recorded_tensors import RecordedTensors

__all__ = ["MemoryTimeline"]


@dataclass(frozen=True)
class MemoryTimeline(Analysis[tuple[LiveStep, ...]]):
    """Live ranges in the first topological order that keeps the graph's own order where it can.

    A tensor lives from the node that writes it to the last that reads it; graph inputs from the start, graph outputs to
    the end. Tensors between a node and its fused activation never exist. Constants are not activations.
    """

    name: ClassVar[str] = "memory-timeline"

    def run(self, graph: Graph, analyses: AnalysisManager) -> tuple[LiveStep, ...]:
        recorded = analyses.get(RecordedTensors)
        structure = analyses.get(GraphStructure)
        group_of = structure.group_of()
        nodes = nodes_by_name(graph)
        position = {name: index for index, name in enumerate(nodes)}
        schedule = list(nx.lexicographical_topological_sort(dataflow(graph), key=position.__getitem__))
        born = {tensor.name: 0 for tensor in graph.inputs}
        last = {tensor.name: 0 for tensor in graph.inputs}
        for step, name in enumerate(schedule):
            for tensor in nodes[name].outputs:
                born[tensor.name] = last[tensor.name] = step
            for tensor in reads(nodes[name]):
                last[tensor.name] = step
        last |= {tensor.name: len(schedule) - 1 for tensor in graph.outputs}
        fixed = np.zeros(len(schedule), np.int64)
        groups: list[Counter[str]] = [Counter() for _ in schedule]
        for name in born.keys() & recorded.keys() - structure.fused:
            if name in group_of:
                for alive in groups[born[name] : last[name] + 1]:
                    alive[group_of[name]] += recorded[name].elements
            else:
                fixed[born[name] : last[name] + 1] += recorded[name].bytes
        return tuple(LiveStep(node, int(fixed[i]), dict(sorted(groups[i].items()))) for i, node in enumerate(schedule))
