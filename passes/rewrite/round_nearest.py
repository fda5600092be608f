"""round-nearest: float weights become the nearest integers with a scale, as the plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.edit import insert_nodes
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass

from .planned import input_scales, weight_of
from .stored_weights import least_scale, nearest, write_weight

__all__ = ["RoundNearest"]


@dataclass(frozen=True)
class RoundNearest(RewritePass):
    """Nearest integers, scales of least squared error per output channel.

    Given:   float weight W → layer
    Result:  integers W/q → DequantizeLinear → W → layer             (activations quantized)
             integers W/q → Cast → Mul by scale → W → layer          (weight only: folds into a float constant)
             integers W/q → DequantizeLinear of blocks → W → layer   (weight only in blocks: a kernel of its own)
    Kept when the plan leaves the layer in float, and where ``round-compensated`` has been. A scale is widened where the
    int32 bias behind it would overflow.
    """

    name: ClassVar[str] = "round-nearest"
    contract: ClassVar[Contract] = "lossy"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plan = context.needed_plan()
        nodes = nodes_by_name(graph)
        scales = input_scales(plan)
        inserted: dict[int, list[gs.Node]] = {}
        for layer in plan.layers:
            node = nodes[layer.name]
            weight = weight_of(node, layer)
            # A weight that several layers share is rounded for the first of them.
            if layer.weight_format == "f32" or not isinstance(weight, gs.Constant):
                continue
            values = np.asarray(weight.values, np.float32)
            rounded = nearest(layer, values, least_scale(layer, node, scales))
            inserted[id(node)] = write_weight(weight, layer, rounded)
        insert_nodes(graph, before=inserted)
        return PassResult(modified=bool(inserted))
