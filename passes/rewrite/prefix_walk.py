"""Two versions of a graph run side by side, from layer to layer: the float one, and the one whose activations are
quantized and whose weights, as far as it has come, are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.numeric.columns import MOMENT_BATCH
from lcpaq_onnx.planning.plan import LayerPlan
from lcpaq_onnx.runtime.calibration import joined_feed, stacks
from lcpaq_onnx.runtime.walk import Walk

from ..analysis.batch_size import BatchSize
from .insert_qdq import InsertQdq

__all__ = ["PrefixWalk"]

Float = NDArray[np.float32]


class PrefixWalk:
    """Asked for layers in graph order; in between, what has been rounded is put in its place with ``replace``."""

    def __init__(self, graph: Graph, context: PassContext, samples: int) -> None:
        """``graph``: before any of its plan is applied; not changed. ``samples``: the first ones, all carried along."""
        analyses = context.analyses
        quantized = graph_io.copy(graph)
        InsertQdq().run(quantized, context)
        # Layers keep their names; what they read may be a DequantizeLinear of their own.
        self._reads = {name: node.inputs[0].name for name, node in nodes_by_name(quantized).items() if node.inputs}
        # Not as many as fit in memory: what is rounded must not depend on the machine.
        together = MOMENT_BATCH if analyses.get(BatchSize) > 1 else 1
        batches = [joined_feed(stack) for stack in stacks(analyses.inputs.samples().take(samples), together)]
        self._float = Walk(graph_io.to_proto(graph), graph.base_dir, batches)
        self._rounded = Walk(graph_io.to_proto(quantized), graph.base_dir, batches)

    def inputs(self, layer: LayerPlan) -> Iterator[tuple[Float, Float]]:
        """Batch by batch, the data input of ``layer`` in the float and in the rounded version."""
        floats, rounded = self._float.to(layer.input), self._rounded.to(self._reads[layer.name])
        for x, z in zip(floats, rounded, strict=True):
            yield np.asarray(x, np.float32), np.asarray(z, np.float32)

    def replace(self, constant: str, values: Float) -> None:
        """In the rounded version ``constant`` is now ``values``."""
        self._rounded.replace(constant, values)
