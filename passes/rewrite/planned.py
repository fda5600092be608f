"""What the quantizing passes look up in a plan and in the graph it is for."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.planning.plan import ActivationPlan, LayerPlan, Plan

__all__ = ["bias_of", "group_of_tensor", "input_scales", "weight_of"]


def weight_of(node: gs.Node, layer: LayerPlan) -> gs.Tensor:
    """The weight operand of a planned layer. Raises PassError when the plan is for another graph."""
    for tensor in node.inputs:
        if tensor.name == layer.weight:
            return tensor
    raise PassError(
        f"node '{layer.name}' does not read the weight '{layer.weight}' that the plan gives it",
        hint="apply the plan to the model it was made for",
    )


def bias_of(node: gs.Node, layer: LayerPlan) -> gs.Constant | None:
    """The constant bias operand, if it still is one."""
    found = [t for t in node.inputs if t.name == layer.bias]
    return found[0] if found and isinstance(found[0], gs.Constant) else None


def group_of_tensor(plan: Plan) -> dict[str, ActivationPlan]:
    """Tensor → planned activation group."""
    return {tensor: group for group in plan.activations for tensor in group.tensors}


def input_scales(plan: Plan) -> dict[str, np.float32]:
    """Layer → scale of its quantized input; layers with a float input are absent."""
    groups = group_of_tensor(plan)
    return {
        layer.name: np.float32(groups[layer.input].scale)
        for layer in plan.layers
        if layer.input in groups and groups[layer.input].format != "f32"
    }
