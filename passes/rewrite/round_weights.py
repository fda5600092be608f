"""round-weights: float weights become integers with a scale, as the plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.edit import constant_to_variable, insert_nodes
from lcpaq_onnx.graph.emit import ROUND_PASS, dequantize_weight, scale_weight
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass
from lcpaq_onnx.numeric.rounding import mse_scales, round_nearest
from lcpaq_onnx.planning.plan import LayerPlan

from .planned import bias_of, input_scales, weight_of

__all__ = ["RoundWeights"]

# Half of int32: leaves room for the products that the bias is added to.
_BIAS_LIMIT = float(1 << 30)


@dataclass(frozen=True)
class RoundWeights(RewritePass):
    """Nearest integers, scales of least squared error per output channel.

    Given:   float weight W → layer
    Result:  integers W/q → DequantizeLinear → W → layer             (activations quantized)
             integers W/q → Cast → Mul by scale → W → layer          (weight only: folds into a float constant)
    Kept when the plan leaves the layer in float. A scale is widened where the int32 bias behind it would overflow.
    """

    name: ClassVar[str] = ROUND_PASS
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
            least = _least_scale(layer, node, scales)
            scale = np.maximum(mse_scales(values, layer.qformat), least).astype(np.float32)
            rounded = round_nearest(values, layer.qformat, scale)
            result = constant_to_variable(weight)
            if layer.layer_format.is_weight_only:
                inserted[id(node)] = scale_weight(rounded, result, self.name)
            else:
                inserted[id(node)] = [dequantize_weight(rounded, result, self.name)]
        insert_nodes(graph, before=inserted)
        return PassResult(modified=bool(inserted))


def _least_scale(layer: LayerPlan, node: gs.Node, input_scales: dict[str, np.float32]) -> NDArray[np.float32]:
    """Smallest weight scale at which the bias still fits its int32."""
    bias = bias_of(node, layer)
    if layer.bias_format != "int32" or bias is None:
        return np.zeros((), np.float32)
    largest = np.abs(np.asarray(bias.values, np.float32))
    needed = np.asarray(largest / (input_scales[layer.name] * np.float32(_BIAS_LIMIT)), np.float32)
    return needed if layer.qformat.axis is not None else np.asarray(needed.max())
