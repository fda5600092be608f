"""Raising the operator set: onnx's version converter says what changes, and only that is changed in the live graph.

The converter's own result lacks metadata of graph, nodes and tensors, some doc strings, and has types nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import ModelError, PassError
from lcpaq_onnx.graph.exporting import node_message
from lcpaq_onnx.graph.graph_check import check_graph
from lcpaq_onnx.graph.graph_io import fix_initializer, load, overridable_initializers, to_proto
from lcpaq_onnx.graph.model import DEFAULT_DOMAINS, Graph
from lcpaq_onnx.graph.usage import label, scopes, unwire

__all__ = ["least_ir_version", "raise_opset", "same_nodes"]

_SHOWN_BYTES = 1024
"""Initializers up to this size are shown to the converter, which looks at scales, axes, pads; larger ones are not."""

_FIRST_IR_WITHOUT_INPUT_INITIALIZERS = 4
_HINT = "plan without raising the opset, or export the model again at a newer one"


def raise_opset(graph: Graph, to: int) -> None:
    """Rewrite ``graph``, of an older opset, for opset ``to`` of the default domain, in place; also the IR version, if
    that opset needs a newer one. New nodes have no names; all others keep theirs, as do all tensors.

    Raises PassError if the converter fails, loses a node, or its result is not valid ONNX.
    """
    if graph.functions:
        raise PassError(
            f"the opset of a model with local functions ({graph.functions[0].name}, …) cannot be raised",
            hint="inline them first, with onnx.inliner.inline_local_functions",
        )
    if any((node.domain or "") in DEFAULT_DOMAINS for scope in scopes(graph) for node in scope.nodes):
        _convert(graph, to)
    if graph.ir_version < _FIRST_IR_WITHOUT_INPUT_INITIALIZERS:
        # There every initializer had to be an input; from the next version on that would make it overridable.
        for constant in overridable_initializers(graph):
            fix_initializer(constant)
    graph.ir_version = max(graph.ir_version, least_ir_version(to))
    graph.opset = to
    try:
        check_graph(graph, payload_bytes=_SHOWN_BYTES)  # no payload has changed
    except ModelError as error:
        raise PassError(f"raised to opset {to}, {error.message}", hint=_HINT) from error


def least_ir_version(opset: int) -> int:
    """The lowest IR version that knows ``opset`` of the default domain."""
    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


def same_nodes(one: Graph, other: Graph) -> bool:
    """Whether both consist of the same nodes in the same order, whatever opset they are read by."""
    return len(one.nodes) == len(other.nodes) and all(
        node_message(a) == node_message(b) for a, b in zip(one.nodes, other.nodes, strict=True)
    )


def _convert(graph: Graph, to: int) -> None:
    before = to_proto(graph)
    _number_nodes(before.graph)
    _hide_large_initializers(before.graph)
    try:
        after = onnx.version_converter.convert_version(before, to)
    except (RuntimeError, ValueError) as error:  # what its C++ assertions become
        raise PassError(
            f"onnx cannot convert the model from opset {graph.opset} to {to}: {error}", hint=_HINT
        ) from error
    if graph.opset < 11 <= to:
        _keep_resize_as_it_was(after.graph)
    _merge(graph, before.graph, load(after), after.graph, {})


# ---- what the converter is shown -----------------------------------------------------------------------------------
def _number_nodes(graph: onnx.GraphProto) -> None:
    """Names by position: they come back, so that nodes that were unnamed or equally named are told apart."""
    for index, node in enumerate(graph.node):
        node.name = str(index)
        for body in _bodies(node).values():
            _number_nodes(body)


def _hide_large_initializers(graph: onnx.GraphProto) -> None:
    """Makes inputs of them: the converter needs no weights, and protobuf stops at 2 GiB."""
    inputs = {value.name for value in graph.input}
    large = [
        tensor
        for tensor in graph.initializer
        if tensor.ByteSize() > _SHOWN_BYTES or tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    for tensor in large:
        if tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        graph.initializer.remove(tensor)


def _keep_resize_as_it_was(graph: onnx.GraphProto) -> None:
    """Up to opset 10, Resize and Upsample had neither half-pixel coordinates nor rounding, which the converter forgets.

    Raises PassError for a nearest one that may shrink: there ONNX Runtime took the ceiling.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        for body in _bodies(node).values():
            _keep_resize_as_it_was(body)
        if node.op_type != "Resize":
            continue
        nearest = all(entry.s != b"linear" for entry in node.attribute if entry.name == "mode")
        scales = constants.get(node.input[-1])
        if nearest and (scales is None or (onnx.numpy_helper.to_array(scales) < 1).any()):
            raise PassError(f"the nearest Resize of '{node.input[0]}' is another one from opset 11 on", hint=_HINT)
        node.attribute.append(onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        node.attribute.append(onnx.helper.make_attribute("nearest_mode", "floor"))


# ---- what of its result is taken over ------------------------------------------------------------------------------
def _merge(
    live: gs.Graph, before: onnx.GraphProto, converted: gs.Graph, after: onnx.GraphProto, outer: dict[str, gs.Tensor]
) -> None:
    """Bring the nodes of ``live``, which ``before`` tells of, to what ``after``, loaded as ``converted``, has.

    ``outer``: tensors of enclosing graphs by name.
    """
    tensors = {**outer, **_by_name(live), "": gs.Variable.empty()}
    originals = dict(enumerate(live.nodes))
    by_outputs = {tuple(node.output): index for index, node in enumerate(before.node)}
    nodes: list[gs.Node] = []
    wires: list[tuple[gs.Node, onnx.NodeProto]] = []
    for new, message in zip(converted.nodes, after.node, strict=True):
        # An operator that is replaced by another one loses its name, not its outputs.
        index = int(message.name) if message.name else by_outputs.get(tuple(message.output))
        old = None if index is None else originals.pop(index, None)
        if old is None:
            # Made anew, so that it is off the tensors of the loaded graph.
            old = gs.Node(message.op_type, attrs=new.attrs, domain=new.domain)
            wires.append((old, message))
        else:
            assert index is not None
            original = before.node[index]
            if not _same_node(original, message):
                _take_attributes(old, original, new, message)
                wires.append((old, message))
            for name, body in _bodies(original).items():
                inner, loaded = old.attrs[name], new.attrs[name]
                assert isinstance(inner, gs.Graph)
                assert isinstance(loaded, gs.Graph)
                _merge(inner, body, loaded, _bodies(message)[name], tensors)
        nodes.append(old)
    if originals:
        lost = ", ".join(label(node) for node in originals.values())
        raise PassError(f"onnx's version converter lost the nodes {lost}", hint=_HINT)
    # All off first: a tensor may move from one node to another.
    for node, _ in wires:
        unwire(node)
    added = _by_name(converted)
    for node, message in wires:
        node.inputs.extend([_tensor(name, tensors, added) for name in message.input])
        node.outputs.extend([_tensor(name, tensors, added) for name in message.output])
    live.nodes = nodes


def _by_name(graph: gs.Graph) -> dict[str, gs.Tensor]:
    wired: Iterator[Sequence[gs.Tensor]] = (list(node.inputs) + list(node.outputs) for node in graph.nodes)
    return {tensor.name: tensor for group in (graph.inputs, graph.outputs, *wired) for tensor in group}


def _tensor(name: str, tensors: dict[str, gs.Tensor], added: dict[str, gs.Tensor]) -> gs.Tensor:
    """The live tensor, or a new one like the converter's."""
    if name not in tensors:
        new = added[name]
        tensors[name] = type(new)(name, new._values) if isinstance(new, gs.Constant) else gs.Variable(name)
    return tensors[name]


def _take_attributes(old: gs.Node, original: onnx.NodeProto, new: gs.Node, message: onnx.NodeProto) -> None:
    """The operator and changed attributes of ``new``; equal ones and bodies stay the live ones."""
    known = {entry.name: _plain(entry) for entry in original.attribute}
    same = {entry.name for entry in message.attribute if known.get(entry.name) == _plain(entry)}
    same |= _bodies(message).keys()
    old.op = message.op_type
    old.attrs = {name: old.attrs[name] if name in same else value for name, value in new.attrs.items()}


def _same_node(one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    return (
        one.op_type == other.op_type
        and one.input == other.input
        and one.output == other.output
        and _plain_attributes(one) == _plain_attributes(other)
    )


def _plain_attributes(node: onnx.NodeProto) -> dict[str, bytes]:
    bodies = _bodies(node)
    return {entry.name: _plain(entry) for entry in node.attribute if entry.name not in bodies}


def _plain(attribute: onnx.AttributeProto) -> bytes:
    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    copy.ClearField("doc_string")
    data: bytes = copy.SerializeToString(deterministic=True)
    return data


def _bodies(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    return {entry.name: entry.g for entry in node.attribute if entry.type == onnx.AttributeProto.GRAPH}
