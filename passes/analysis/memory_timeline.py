"""Which activations are alive at every step of a schedule."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import ClassVar

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name, predecessors, reads
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
        schedule = _schedule(predecessors(graph))
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


def _schedule(predecessors: Mapping[str, Collection[str]]) -> list[str]:
    """The first topological order: of the nodes that can come next, always the one that the graph lists first."""
    names = list(predecessors)
    position = {name: index for index, name in enumerate(names)}
    sorter = TopologicalSorter(predecessors)
    sorter.prepare()
    ready: list[int] = []
    schedule = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, position[name])
        schedule.append(names[heapq.heappop(ready)])
        sorter.done(schedule[-1])
    return schedule
