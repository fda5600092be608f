"""The response of a linear layer to changed weights, as a model whose weights are an input."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

__all__ = ["grouped_response_model"]


def grouped_response_model(op: str, attrs: Mapping[str, object], rank: int, draws: int) -> onnx.ModelProto:
    """Conv or ConvTranspose over ``draws`` weights at once: inputs ``x`` [n, draws·C, …] and ``v`` [draws·M, C/g, …]
    (ConvTranspose: [draws·C, M/g, …]), output ``y``. Each draw is one more set of groups, so its weights meet its own
    channels only. ``attrs`` are the layer's.
    """
    group = attrs.get("group", 1)
    assert isinstance(group, int)
    node = helper.make_node(op, ["x", "v"], ["y"], group=group * draws)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attrs.items() if name != "group")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in ("x", "v", "y")]
    graph = helper.make_graph([node], "response", values[:2], values[2:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
