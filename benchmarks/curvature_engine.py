"""The engine as the benchmarks use it: analyses of one prepared model on calibration feeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from assets_tasks import Feed
from numpy.typing import NDArray

import lcpaq_onnx
from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.query import Layer, nodes_by_name, weight_values
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager, AnyAnalysis
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.passes import BatchSize, CalibrationRun, GraphStructure, RecordedTensors
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.resources import Execution
from lcpaq_onnx.runtime.session import Session

__all__ = ["Subject", "calibrated", "opened"]

Float = NDArray[np.float32]

_OF_CALIBRATION: tuple[AnyAnalysis, ...] = (RecordedTensors(), GraphStructure(), BatchSize(), CalibrationRun())


@dataclass(frozen=True, eq=False)
class Subject:
    """A model prepared as ``quantize`` prepares it, its layers, and the weights that rounding makes of theirs."""

    graph: Graph
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, model: Path | onnx.ModelProto, feeds: list[Feed]) -> Subject:
        """``feeds``: calibration samples; one is run to see the shapes."""
        graph = lcpaq_onnx.prepare(lcpaq_onnx.load(model))
        with opened(graph, feeds[:1], Execution("serial")) as analyses:
            return cls(graph, analyses.get(GraphStructure).layers)

    @cached_property
    def proto(self) -> onnx.ModelProto:
        return to_proto(self.graph)

    @cached_property
    def weights(self) -> dict[str, Float]:
        """By initializer."""
        nodes = nodes_by_name(self.graph)
        return {layer.weight: weight_values(nodes[layer.name], layer) for layer in self.layers}

    def rounded(self, layer: Layer, bits: int) -> Float:
        """The layer's weight as nearest rounding leaves it."""
        weight = self.weights[layer.weight]
        return round_nearest(weight, QFormat(bits=bits, axis=layer.channel_axis)).dequantized()

    def entries(self, widths: tuple[int, ...]) -> frozenset[tuple[str, int]]:
        """Every layer at every width."""
        return frozenset((layer.name, bits) for layer in self.layers for bits in widths)


@contextmanager
def opened(graph: Graph, feeds: list[Feed], execution: Execution, *, seed: int = 0) -> Iterator[AnalysisManager]:
    """Analyses of ``graph``, nothing computed yet; the workers are closed at the end."""
    session = Session(to_proto(graph), base_dir=graph.base_dir)
    with execution.resources() as resources:
        data = open_calibration(feeds, session.inputs)
        yield AnalysisManager(graph, AnalysisInputs(calibration=data, seed=seed, resources=resources))


@contextmanager
def calibrated(source: AnalysisManager, execution: Execution) -> Iterator[AnalysisManager]:
    """As ``source``, with what calibration finds (ranges, loss, shapes, batch size) known, all else forgotten."""
    with execution.resources() as resources:
        fresh = AnalysisManager(source.graph, replace(source.inputs, resources=resources))
        for analysis in _OF_CALIBRATION:
            fresh.put(analysis, source.get(analysis))
        yield fresh
