"""insert-qdq: activation groups that the plan quantizes get their QuantizeLinear/DequantizeLinear pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.graph.edit import insert_nodes, redirect_readers, split_writer
from lcpaq_onnx.graph.emit import (
    QDQ_PASS,
    activation_constants,
    conversion_ends,
    isolated_dequantize,
    isolated_name,
    quantize_dequantize,
)
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass
from lcpaq_onnx.planning.plan import ActivationPlan, LayerPlan

from .planned import group_of_tensor

__all__ = ["InsertQdq"]


@dataclass(frozen=True)
class InsertQdq(RewritePass):
    """Conversions of activations, one pair per tensor; tensors of a group share scale and zero point.

    Given:   producer → t → consumers
    Result:  producer → t/f → QuantizeLinear → t/q → DequantizeLinear → t → consumers
             graph input t → QuantizeLinear → t/q → DequantizeLinear → t/dq → consumers
             a float layer marked ``isolate_input`` reads t/q through a DequantizeLinear of its own
    Kept when the plan leaves the group in float. Bodies of control flow go on reading what they read.
    """

    name: ClassVar[str] = QDQ_PASS
    contract: ClassVar[Contract] = "lossy"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plan = context.needed_plan()
        tensors = graph.tensors()
        nodes = nodes_by_name(graph)
        top_level = {id(node) for node in graph.nodes}
        inputs = {tensor.name for tensor in graph.inputs}
        first: list[gs.Node] = []
        after: dict[int, list[gs.Node]] = {}
        for group in plan.activations:
            format = group.qformat
            if format is None:
                continue
            scale, zero_point = activation_constants(group.name, group.scale, group.zero_point, format)
            for name in group.tensors:
                if name not in tensors:
                    raise PassError(f"the graph has no tensor '{name}'", hint="apply the plan to its own model")
                tensor = tensors[name]
                before, behind = conversion_ends(name, is_input=name in inputs)
                if name in inputs:
                    readers = [node for node in tensor.outputs if id(node) in top_level]
                    redirect_readers(readers, tensor, behind)
                    first += quantize_dequantize(tensor, behind, scale, zero_point, name=name, made_by=self.name)
                else:
                    (writer,) = tensor.inputs
                    split_writer(tensor, before)
                    pair = quantize_dequantize(before, tensor, scale, zero_point, name=name, made_by=self.name)
                    after.setdefault(id(writer), []).extend(pair)
        insert_nodes(graph, first=first, after=after)
        self._isolate(graph, [layer for layer in plan.layers if layer.isolate_input], group_of_tensor(plan), nodes)
        return PassResult(modified=bool(first or after))

    def _isolate(
        self, graph: Graph, layers: list[LayerPlan], groups: dict[str, ActivationPlan], nodes: dict[str, gs.Node]
    ) -> None:
        inserted: dict[int, list[gs.Node]] = {}
        for layer in layers:
            node, group = nodes[layer.name], groups[layer.input]
            format = group.qformat
            assert format is not None
            (shared,) = node.inputs[0].inputs
            result = gs.Variable(isolated_name(layer.input, layer.name))
            dequantize = isolated_dequantize(
                shared.inputs[0],
                result,
                group.scale,
                group.zero_point,
                layer.input_channels,
                format,
                self.name,
                axis=facts_of(layer.op).input_channel_axis,
            )
            node.inputs[0] = result
            inserted[id(node)] = [dequantize]
        insert_nodes(graph, before=inserted)
