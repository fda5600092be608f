"""separate-shared-biases: every layer gets a bias of its own, because the scale of an int32 bias is the layer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.usage import all_tensors, is_overridable, label, returned, unique_name
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

__all__ = ["SeparateSharedBiases"]


@dataclass(frozen=True)
class SeparateSharedBiases(RewritePass):
    """Biases are small; weights, which are not, stay shared.

    Given:   constant b → layer1, b → layer2 or anything else
    Result:  b/layer1 → layer1, b/layer2 → layer2; b itself only if something else reads it
    Kept when a caller may override b.
    """

    name: ClassVar[str] = "separate-shared-biases"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        taken = {tensor.name for tensor in all_tensors(graph)}
        kept = returned(graph)
        notes = []
        shared = []
        for node in graph.nodes:
            index = facts_of(node.op, node.domain).bias_input
            if index is None or len(node.inputs) <= index:
                continue
            bias = node.inputs[index]
            if not isinstance(bias, gs.Constant) or (len(bias.outputs) == 1 and id(bias) not in kept):
                continue
            if is_overridable(graph, bias):
                notes.append(Note(label(node), f"its bias '{bias.name}' is shared, and also an input of the model"))
                continue
            shared.append((node, index, bias))
        for node, index, bias in shared:
            name = unique_name(f"{bias.name}/{label(node)}", taken)
            taken.add(name)
            # The payload is not copied; a bias that still is as in the file is written as it is there.
            node.inputs[index] = type(bias)(name, bias._values)
        return PassResult(bool(shared), tuple(notes))
