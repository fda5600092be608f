"""Questions about a graph: its layers, its activation groups, the operators between them. Nothing here edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.operands import has_other_readers, operands_of
from lcpaq_onnx.graph.ops import facts_of, weight_channel_axis
from lcpaq_onnx.tables import RecordedTensor

__all__ = [
    "ActivationGroup",
    "Layer",
    "Operator",
    "Structure",
    "input_channels",
    "nodes_by_name",
    "predecessors",
    "reads",
    "structure_of",
    "weight_values",
]


@dataclass(frozen=True)
class Layer:
    """A node with constant weights and the activation function that fuses with it. ``input``: what the weights meet;
    integer indices where the layer looks up rows of a table.
    """

    name: str
    op: str
    input: str
    weight: str
    weight_shape: tuple[int, ...]
    channel_axis: int | None
    bias: str | None
    raw_output: str
    """What the node itself writes."""
    output: str
    """What is left after the fused activation: the tensor that an integer kernel would requantize."""
    has_other_readers: bool = False
    """Something that is no layer reads the weight too, and must not convert it at every run."""

    @property
    def is_lookup(self) -> bool:
        """Whether it picks rows of its weight: quantized, they are picked as integers and scaled behind."""
        return facts_of(self.op).looks_up


@dataclass(frozen=True)
class ActivationGroup:
    """Float tensors that must share one scale and format. Named after its first tensor in graph order."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Operator:
    """A node without weights that reads or writes float tensors (``inputs``, ``outputs``; the outputs after a fused
    activation). ``has_float_constant``: some operand is a float constant, which would need a scale of its own to run
    in integer. ``moves_data``: keeps values, so input and output share a group.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    has_float_constant: bool
    moves_data: bool


@dataclass(frozen=True)
class Structure:
    """Layers, activation groups and other operators of a graph, in graph order.

    ``fused``: tensors between a node and the activation that fuses with it; integer kernels never write them.
    """

    layers: tuple[Layer, ...]
    groups: tuple[ActivationGroup, ...]
    operators: tuple[Operator, ...]
    fused: frozenset[str]
    inputs: frozenset[str]
    outputs: frozenset[str]

    def candidates(self) -> tuple[ActivationGroup, ...]:
        """Groups that a layer, or an operator with an integer kernel somewhere, reads or writes."""
        ends = {name for layer in self.layers for name in (layer.input, layer.output)}
        for operator in self.operators:
            if facts_of(operator.op).integer_kernel:
                ends.update((*operator.inputs, *operator.outputs))
        return tuple(group for group in self.groups if not ends.isdisjoint(group.tensors))

    def group_of(self) -> dict[str, str]:
        """Tensor name → name of its group."""
        return {tensor: group.name for group in self.groups for tensor in group.tensors}


def nodes_by_name(graph: Graph) -> dict[str, gs.Node]:
    """Top-level nodes by name (unique after ``canonical-names``)."""
    return {node.name: node for node in graph.nodes}


def input_channels(layer: Layer, tensors: Mapping[str, RecordedTensor]) -> int:
    """Extent of the layer's input along the axis its weights sum over."""
    return tensors[layer.input].shape[facts_of(layer.op).input_channel_axis]


def weight_values(node: gs.Node, layer: Layer) -> NDArray[np.float32]:
    """The layer's weight, read-only by convention."""
    tensor = next(tensor for tensor in node.inputs if tensor.name == layer.weight)
    assert isinstance(tensor, gs.Constant)
    return np.asarray(tensor.values, np.float32)


def structure_of(graph: Graph, dtypes: Mapping[str, np.dtype]) -> Structure:
    """Structure of the top-level graph. ``dtypes``: recorded element type of every variable (names absent there are not
    quantizable). Bodies of control flow are left alone.
    """
    top_level = {id(node) for node in graph.nodes}
    fused = {
        node.name: after
        for node in graph.nodes
        if (after := _fused_activation(graph, node)) is not None and id(after) in top_level
    }
    layers = [layer for node in graph.nodes if (layer := _layer(graph, node, fused, dtypes)) is not None]
    inside = {activation.inputs[0].name for activation in fused.values()}
    floats = [
        tensor.name
        for tensor in _in_graph_order(graph)
        if dtypes.get(tensor.name) == np.float32 and tensor.name not in inside
    ]
    groups = _groups(graph, floats)
    members = {tensor for group in groups for tensor in group.tensors}
    elsewhere = {layer.name for layer in layers} | {activation.name for activation in fused.values()}
    operators = [_operator(node, fused, members) for node in graph.nodes if node.name not in elsewhere]
    return Structure(
        layers=tuple(layers),
        groups=tuple(groups),
        operators=tuple(operator for operator in operators if operator.inputs or operator.outputs),
        fused=frozenset(inside),
        inputs=frozenset(tensor.name for tensor in graph.inputs),
        outputs=frozenset(tensor.name for tensor in graph.outputs),
    )


def reads(node: gs.Node) -> list[gs.Tensor]:
    """Tensors a node reads, those that its bodies capture from this scope included."""
    captured = []
    for body in node.subgraphs(recursive=True):
        written = {id(tensor) for inner in body.nodes for tensor in inner.outputs}
        own = written | {id(tensor) for tensor in body.inputs}
        captured += [t for inner in body.nodes for t in inner.inputs if id(t) not in own]
        captured += [t for t in body.outputs if id(t) not in own]
    return [tensor for tensor in (*node.inputs, *captured) if not tensor.is_empty()]


def predecessors(graph: Graph) -> dict[str, set[str]]:
    """Top-level node → the nodes whose results it reads, all by name and in graph order."""
    writer = {id(tensor): node.name for node in graph.nodes for tensor in node.outputs}
    return {node.name: {writer[id(t)] for t in reads(node) if id(t) in writer} for node in graph.nodes}


def _in_graph_order(graph: Graph) -> Iterable[gs.Tensor]:
    yield from graph.inputs
    for node in graph.nodes:
        yield from (tensor for tensor in node.outputs if not tensor.is_empty())


def _layer(graph: Graph, node: gs.Node, fused: Mapping[str, gs.Node], dtypes: Mapping[str, np.dtype]) -> Layer | None:
    operands = operands_of(node, dtypes)
    if operands is None:
        return None
    data, weight = operands
    others = has_other_readers(graph, node.op, weight, dtypes)
    if others and facts_of(node.op).looks_up:
        return None  # the rows are picked from what is restored for the others
    shape = tuple(int(d) for d in weight.shape)
    bias = facts_of(node.op).bias_input
    raw = node.outputs[0]
    return Layer(
        name=node.name,
        op=node.op,
        input=data.name,
        weight=weight.name,
        weight_shape=shape,
        channel_axis=weight_channel_axis(node.op, node.attrs, shape),
        bias=node.inputs[bias].name if bias is not None and len(node.inputs) > bias else None,
        raw_output=raw.name,
        output=_after_activation(node, fused)[0].name,
        has_other_readers=others,
    )


def _fused_activation(graph: Graph, node: gs.Node) -> gs.Node | None:
    """The activation node that alone reads the only output of ``node``, unless that is also an output of the graph."""
    if len(node.outputs) != 1 or len(node.outputs[0].outputs) != 1 or _is_activation(node):
        return None
    raw, after = node.outputs[0], node.outputs[0].outputs[0]
    if any(raw is output for output in graph.outputs) or after.inputs[0] is not raw:
        return None
    bounds_are_constant = all(isinstance(t, gs.Constant) or t.is_empty() for t in after.inputs[1:])
    return after if _is_activation(after) and bounds_are_constant else None


def _keeps_scale(node: gs.Node) -> bool:
    facts = facts_of(node.op, node.domain)
    if not facts.keeps_scale or facts.fill_input is None or len(node.inputs) <= facts.fill_input:
        return facts.keeps_scale
    fill = node.inputs[facts.fill_input]
    return fill.is_empty() or (isinstance(fill, gs.Constant) and not np.any(np.asarray(fill.values)))


def _is_activation(node: gs.Node) -> bool:
    return facts_of(node.op, node.domain).activation


def _after_activation(node: gs.Node, fused: Mapping[str, gs.Node]) -> list[gs.Tensor]:
    return list(fused[node.name].outputs if node.name in fused else node.outputs)


def _groups(graph: Graph, floats: list[str]) -> list[ActivationGroup]:
    """Union of float tensors through operators that keep the scale."""
    parent = {name: name for name in floats}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    rank = {name: position for position, name in enumerate(floats)}
    for node in graph.nodes:
        if not _keeps_scale(node) or node.inputs[0].name not in parent:
            continue
        for output in node.outputs:
            if output.name in parent:
                first, second = sorted((root(node.inputs[0].name), root(output.name)), key=rank.__getitem__)
                parent[second] = first
    members: dict[str, list[str]] = {}
    for name in floats:
        members.setdefault(root(name), []).append(name)
    return [ActivationGroup(name, tuple(tensors)) for name, tensors in members.items()]


def _operator(node: gs.Node, fused: Mapping[str, gs.Node], floats: set[str]) -> Operator:
    return Operator(
        name=node.name,
        op=node.op,
        inputs=tuple(t.name for t in node.inputs if t.name in floats),
        outputs=tuple(t.name for t in _after_activation(node, fused) if t.name in floats),
        has_float_constant=any(isinstance(t, gs.Constant) and t.dtype == np.float32 for t in node.inputs),
        moves_data=_keeps_scale(node),
    )
