"""Second moments of layers' inputs in the float model, over the first calibration samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.columns import MOMENT_SAMPLES, chosen_columns
from lcpaq_onnx.numeric.layer_matrix import LayerMatrix
from lcpaq_onnx.numeric.moments import Moments, MomentStream
from lcpaq_onnx.runtime.calibration import joined_feed, stacks
from lcpaq_onnx.runtime.session import Session

from .batch_size import BatchSize
from .graph_structure import GraphStructure

__all__ = ["InputMoments", "LayerMatrices"]


@dataclass(frozen=True)
class LayerMatrices(Analysis[dict[str, LayerMatrix]]):
    """Layers that are a product of matrices, so that their rounding can make up for its errors."""

    name: ClassVar[str] = "layer-matrices"

    def run(self, graph: Graph, analyses: AnalysisManager) -> dict[str, LayerMatrix]:
        nodes = nodes_by_name(graph)
        found = {
            layer.name: LayerMatrix.of(layer.op, nodes[layer.name].attrs, layer.weight_shape)
            for layer in analyses.get(GraphStructure).layers
        }
        return {name: matrix for name, matrix in found.items() if matrix is not None}


@dataclass(frozen=True)
class InputMoments(Analysis[Mapping[str, Moments]]):
    """Layer → moments of its columns; centered where the layer has a bias, which makes up for means."""

    name: ClassVar[str] = "input-moments"
    samples: int = MOMENT_SAMPLES

    def run(self, graph: Graph, analyses: AnalysisManager) -> Mapping[str, Moments]:
        model = to_proto(graph)
        matrices = analyses.get(LayerMatrices())
        layers = [layer for layer in analyses.get(GraphStructure).layers if layer.name in matrices]
        fed = {value.name for value in model.graph.input}
        inputs = list(dict.fromkeys(layer.input for layer in layers))
        observed = with_outputs(model, [name for name in inputs if name not in fed])
        resources = analyses.inputs.resources
        session = Session(observed, resources.cache_options, base_dir=graph.base_dir)
        asked = [name for name in inputs if name not in fed]
        streams = {
            layer.name: MomentStream(
                matrices[layer.name].groups, matrices[layer.name].columns, has_changed_inputs=False
            )
            for layer in layers
        }
        data = analyses.inputs.samples().take(self.samples)
        count = data.sample_count or self.samples
        with analyses.inputs.progress.track("gathering moments", data.sample_count) as advance:
            for number, feeds in enumerate(stacks(data, analyses.get(BatchSize))):
                feed = joined_feed(feeds)
                values = feed | (session.run(feed, asked) if asked else {})
                for layer in layers:
                    matrix, x = matrices[layer.name], np.asarray(values[layer.input], np.float32)
                    chosen = chosen_columns(matrix, layer.name, x.shape, number, len(feeds) / count)
                    columns = matrix.columns_of(x, chosen)
                    streams[layer.name].update(columns, columns)
                advance(len(feeds))
        return {layer.name: _of(streams.pop(layer.name), has_bias=layer.bias is not None) for layer in layers}


def _of(stream: MomentStream, *, has_bias: bool) -> Moments:
    moments = stream.result()
    return moments.centered() if has_bias else moments
