"""The response of a linear layer to changed weights, as a model whose weights are an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

__all__ = ["grouped_response_model", "product_model"]


def grouped_response_model(op: str, attrs: Mapping[str, object], rank: int, draws: int) -> onnx.ModelProto:
    """Conv or ConvTranspose over ``draws`` weights at once: inputs ``x`` [n, draws·C, …] and ``v`` [draws·M, C/g, …]
    (ConvTranspose: [draws·C, M/g, …]), output ``y``. Each draw is one more set of groups, so its weights meet its own
    channels only. ``attrs`` are the layer's.
    """
    group = attrs.get("group", 1)
    assert isinstance(group, int)
    node = helper.make_node(op, ["x", "v"], ["y"], group=group * draws)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attrs.items() if name != "group")
    return _one_node(node, [None] * rank)


def product_model() -> onnx.ModelProto:
    """``y = MatMul(a, b)`` of any ranks, with numpy's broadcasting."""
    return _one_node(helper.make_node("MatMul", ["a", "b"], ["y"]), None)


def _one_node(node: onnx.NodeProto, shape: Sequence[int | str | None] | None) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in (*node.input, *node.output)]
    graph = helper.make_graph([node], "response", values[:-1], values[-1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
