"""quantize-biases: biases of integer layers become int32 in the accumulator's own scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.graph.edit import constant_to_variable, insert_nodes
from lcpaq_onnx.graph.emit import BIAS_PASS, dequantize_bias
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass

from .planned import bias_of, input_scales, weight_of

__all__ = ["QuantizeBiases"]


@dataclass(frozen=True)
class QuantizeBiases(RewritePass):
    """Int32 biases whose scale is exactly float32(input scale × weight scale), which is what kernels assume.

    Given:   layer(x, W, float bias) with x and W quantized
    Result:  int32 bias/q → DequantizeLinear → bias → layer
    Kept when the plan leaves the bias in float. Run after the rounding passes.
    """

    name: ClassVar[str] = BIAS_PASS
    contract: ClassVar[Contract] = "lossy"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plan = context.needed_plan()
        nodes = nodes_by_name(graph)
        scales = input_scales(plan)
        inserted: dict[int, list[gs.Node]] = {}
        for layer in plan.layers:
            node = nodes[layer.name]
            bias = bias_of(node, layer)
            if layer.bias_format != "int32" or bias is None:
                continue
            (dequantize,) = weight_of(node, layer).inputs
            weight_scale = dequantize.inputs[1]
            assert isinstance(weight_scale, gs.Constant)
            scale = np.asarray(scales[layer.name] * weight_scale.values, np.float32)
            values = np.asarray(bias.values, np.float32)
            integers = np.rint(values.astype(np.float64) / scale)
            if np.abs(integers).max(initial=0) > np.iinfo(np.int32).max:
                raise PassError(
                    f"bias '{bias.name}' of '{layer.name}' overflows int32 at scale {scale.min():.3g}",
                    hint="run round-nearest before quantize-biases, or set bias_format to f32 in the plan",
                )
            result = constant_to_variable(bias)
            inserted[id(node)] = [dequantize_bias(integers.astype(np.int32), scale, result, self.name)]
        insert_nodes(graph, before=inserted)
        return PassResult(modified=bool(inserted))
