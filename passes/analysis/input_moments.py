"""Second moments of layers' inputs in the float model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.query import Layer, nodes_by_name
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.columns import MOMENT_BATCH, chosen_columns, moment_samples
from lcpaq_onnx.numeric.layer_matrix import LayerMatrix
from lcpaq_onnx.numeric.moments import Moments, MomentStream
from lcpaq_onnx.runtime.blas import one_blas_thread
from lcpaq_onnx.runtime.calibration import feed_digest, joined_feed, stacks
from lcpaq_onnx.runtime.session import Session

from .batch_size import BatchSize
from .calibration_run import CalibrationRun
from .graph_structure import GraphStructure
from .recorded_tensors import RecordedTensors

__all__ = ["InputMoments", "LayerMatrices", "MomentData", "MomentSamples", "wanted_samples"]

# Most that errors are measured on.
_MEASURED_SAMPLES = 128
# Numbers in the second moments of one layer: half a gigabyte.
_MOST_MOMENTS = 1 << 27


@dataclass(frozen=True)
class LayerMatrices(Analysis[dict[str, LayerMatrix]]):
    """Layers that are a product of matrices, so that their rounding can make up for its errors; of at most 11,585
    columns, so that their moments fit in memory.
    """

    name: ClassVar[str] = "layer-matrices"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, LayerMatrix]:
        nodes = nodes_by_name(graph)
        found = {
            layer.name: LayerMatrix.of(layer.op, nodes[layer.name].attrs, layer.weight_shape)
            for layer in analyses.get(GraphStructure).layers
        }
        return {
            name: matrix
            for name, matrix in found.items()
            if matrix is not None and matrix.groups * matrix.columns**2 <= _MOST_MOMENTS
        }


@dataclass(frozen=True)
class MomentData:
    """``samples`` of the calibration data from number ``first`` on; ``sha256`` of their bytes."""

    first: int
    samples: int
    sha256: str


@dataclass(frozen=True)
class MomentSamples(Analysis[MomentData]):
    """Those behind the ones that errors are measured on, as far as there are more: rounding fits what it has seen, and
    its error there would look too small.
    """

    name: ClassVar[str] = "moment-samples"

    def run(self, graph: Graph, analyses: AnalysisManager) -> MomentData:
        present = analyses.get(CalibrationRun).samples
        first = min(_MEASURED_SAMPLES, present // 2)
        digest, count = hashlib.sha256(), 0
        for feed in islice(analyses.inputs.samples().take(first + wanted_samples(analyses)), first, None):
            feed_digest(digest, feed)
            count += 1
        return MomentData(first, count, digest.hexdigest())


@dataclass(frozen=True)
class InputMoments(Analysis[Mapping[str, Moments]]):
    """Layer → moments of its columns; centered where the layer has a bias, which makes up for means."""

    name: ClassVar[str] = "input-moments"

    def run(self, graph: Graph, analyses: AnalysisManager) -> Mapping[str, Moments]:
        matrices = analyses.get(LayerMatrices())
        layers = [layer for layer in analyses.get(GraphStructure).layers if layer.name in matrices]
        data = analyses.get(MomentSamples())
        streams = {layer.name: _Stream(layer, matrices[layer.name]) for layer in layers}
        model = to_proto(graph)
        fed = {value.name for value in model.graph.input}
        asked = [name for name in dict.fromkeys(layer.input for layer in layers) if name not in fed]
        options = analyses.inputs.resources.cache_options
        session = Session(with_outputs(model, asked), options, base_dir=graph.base_dir)
        chosen = islice(analyses.inputs.samples().take(data.first + data.samples), data.first, None)
        # Not as many as fit in memory: what is drawn must not depend on the machine.
        batches = stacks(chosen, MOMENT_BATCH if analyses.get(BatchSize) > 1 else 1)
        with one_blas_thread(), analyses.inputs.progress.track("gathering moments", data.samples) as advance:
            for number, feeds in enumerate(batches):
                feed = joined_feed(feeds)
                values = feed | (session.run(feed, asked) if asked else {})
                for layer in layers:
                    streams[layer.name].add(values[layer.input], number, len(feeds) / data.samples)
                advance(len(feeds))
        return {layer.name: streams.pop(layer.name).result() for layer in layers}


class _Stream:
    """Moments of one layer."""

    def __init__(self, layer: Layer, matrix: LayerMatrix) -> None:
        self._layer, self._matrix = layer, matrix
        self._moments = MomentStream(matrix.groups, matrix.columns, has_changed_inputs=False)

    def add(self, value: NDArray[np.generic], number: int, share: float) -> None:
        """The layer's input in batch ``number``, which is ``share`` of all."""
        x = np.asarray(value, np.float32)
        columns = self._matrix.columns_of(x, chosen_columns(self._matrix, self._layer.name, x.shape, number, share))
        self._moments.update(columns, columns)

    def result(self) -> Moments:
        return self._moments.result() if self._layer.bias is None else self._moments.centered()


def wanted_samples(analyses: AnalysisManager) -> int:
    """How many samples to take moments of, as far as there are so many."""
    matrices, recorded = analyses.get(LayerMatrices()), analyses.get(RecordedTensors)
    inputs = {layer.name: layer.input for layer in analyses.get(GraphStructure).layers}
    return moment_samples(matrix.column_count(recorded[inputs[name]].shape) for name, matrix in matrices.items())
