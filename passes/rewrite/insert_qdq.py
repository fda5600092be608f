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
    move_integers,
    quantize_dequantize,
    read_on_integers,
    written_on_integers,
)
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.graph.usage import unwire
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass
from lcpaq_onnx.planning.plan import ActivationPlan, LayerPlan

from .planned import group_of_tensor

__all__ = ["InsertQdq"]


@dataclass(frozen=True)
class InsertQdq(RewritePass):
    """Conversions of activations, one pair per tensor; tensors of a group share scale and zero point.

    Given:   producer → t → consumers
    Result:  producer → t/f → QuantizeLinear → t/q → DequantizeLinear → t → consumers
             a node that only moves data and that the plan names works on the integers: t/q → Pad → u/q
             graph input t → QuantizeLinear → t/q → DequantizeLinear → t/dq → consumers
             a float layer marked ``isolate_input`` reads t/q through a DequantizeLinear of its own
    Kept when the plan leaves the group in float. Bodies of control flow go on reading what they read.
    """

    name: ClassVar[str] = QDQ_PASS
    contract: ClassVar[Contract] = "lossy"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plan = context.needed_plan()
        nodes = nodes_by_name(graph)
        places = _Places(graph, dict(graph.tensors()))
        for group in plan.activations:
            format = group.qformat
            if format is None:
                continue
            scale, zero_point = activation_constants(group.name, group.scale, group.zero_point, format)
            moved = {name: (nodes[name].inputs[0].name, nodes[name].outputs[0].name) for name in group.integer_nodes}
            integers = {
                name: places.convert(name, scale, zero_point, group.integer_nodes, self.name) for name in group.tensors
            }
            for name, (source, result) in moved.items():
                move_integers(nodes[name], integers[source], integers[result], zero_point)
        insert_nodes(graph, first=places.first, after=places.after)
        self._isolate(graph, [layer for layer in plan.layers if layer.isolate_input], group_of_tensor(plan), nodes)
        return PassResult(modified=bool(places.first or places.after))

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


class _Places:
    """New nodes by where they go: ``first`` in the graph, or ``after`` the node of that ``id()``."""

    def __init__(self, graph: Graph, tensors: dict[str, gs.Tensor]) -> None:
        self.first: list[gs.Node] = []
        self.after: dict[int, list[gs.Node]] = {}
        self._tensors = tensors
        self._top_level = {id(node) for node in graph.nodes}
        self._inputs = {tensor.name for tensor in graph.inputs}
        self._outputs = {tensor.name for tensor in graph.outputs}

    def convert(
        self, name: str, scale: gs.Tensor, zero_point: gs.Tensor, explicit: tuple[str, ...], made_by: str
    ) -> gs.Tensor:
        """Quantize and dequantize the tensor ``name``, as far as its neighbours are not ``explicit`` nodes that work on
        the integers. Returns the integers.
        """
        if name not in self._tensors:
            raise PassError(f"the graph has no tensor '{name}'", hint="apply the plan to the model it was made for")
        tensor = self._tensors[name]
        has_integers = written_on_integers(tensor, explicit)
        needs_floats = not read_on_integers(tensor, explicit, is_output=name in self._outputs)
        source: gs.Tensor
        result: gs.Tensor
        before, behind = conversion_ends(name, is_input=name in self._inputs)
        if name in self._inputs:
            redirect_readers([node for node in tensor.outputs if id(node) in self._top_level], tensor, behind)
            source, result, place = tensor, behind, self.first
        else:
            place = self.after.setdefault(id(tensor.inputs[0]), [])
            split_writer(tensor, before)
            source, result = before, tensor
        quantize, dequantize = quantize_dequantize(source, result, scale, zero_point, name=name, made_by=made_by)
        integers = quantize.outputs[0]
        for node, is_needed in ((quantize, not has_integers), (dequantize, needs_floats)):
            if is_needed:
                place.append(node)
            else:
                unwire(node)
        return integers
