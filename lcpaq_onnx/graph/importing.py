"""ModelProto to graphsurgeon objects. graphsurgeon wires nodes and tensors; everything else is read here.

``gs.import_onnx`` is shown a skeleton: names and subgraphs only. It loses attribute kinds, fails on some types and
takes an outer tensor for an initializer of a subgraph with the same name; initializers therefore go in as inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util import misc

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph.exporting import function_message
from lcpaq_onnx.graph.external_data import DataFolder
from lcpaq_onnx.graph.notes import (
    METADATA,
    NOTES,
    Entry,
    FunctionNotes,
    NodeNotes,
    ScopeNotes,
    Section,
    TensorNotes,
    tensor_notes,
)
from lcpaq_onnx.graph.tensors import StoredConstant, StoredSparseValues, StoredValues, numpy_dtype
from lcpaq_onnx.graph.value_info import described

__all__ = ["import_model"]


def import_model(model: onnx.ModelProto, folder: DataFolder) -> gs.Graph:
    """The graph of ``model`` with notes on all its objects; shares nothing with ``model``.

    Raises ModelError for unknown data types, missing external data, and graphs that cannot be wired.
    """
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    skeleton.graph.CopyFrom(_skeleton(model.graph))
    for function in model.functions:
        wires = skeleton.functions.add(name=function.name, domain=function.domain, doc_string=function.doc_string)
        wires.input.extend(function.input)
        wires.output.extend(function.output)
        wires.opset_import.extend(function.opset_import)
        wires.node.extend(_skeleton_node(node) for node in function.node)
    try:
        with G_LOGGER.suppress():
            graph = gs.import_onnx(skeleton)
    except gs.OnnxGraphSurgeonException as error:
        raise ModelError(f"the graph cannot be read: {error}", hint="check it with onnx.checker") from error
    reader = _Reader(folder)
    reader.graph(graph, model.graph)
    for live, message in zip(graph.functions, model.functions, strict=True):
        reader.function(live, message)
    return graph


def _skeleton(graph: onnx.GraphProto) -> onnx.GraphProto:
    constants = _constant_names(graph)
    overridable = set(constants)
    inputs = [value.name for value in graph.input if value.name not in overridable]
    skeleton = onnx.GraphProto(name=graph.name, doc_string=graph.doc_string)
    skeleton.input.extend(onnx.ValueInfoProto(name=name) for name in chain(constants, inputs))
    skeleton.output.extend(onnx.ValueInfoProto(name=value.name) for value in graph.output)
    skeleton.node.extend(_skeleton_node(node) for node in graph.node)
    return skeleton


def _skeleton_node(node: onnx.NodeProto) -> onnx.NodeProto:
    skeleton = onnx.NodeProto(op_type=node.op_type, name=node.name, input=node.input, output=node.output)
    if node.HasField("domain"):
        skeleton.domain = node.domain
    for attribute in node.attribute:
        if _is_subgraph(attribute):
            wires = skeleton.attribute.add(name=attribute.name, type=attribute.type)
            wires.g.CopyFrom(_skeleton(attribute.g))
    return skeleton


def _is_subgraph(attribute: onnx.AttributeProto) -> bool:
    return attribute.type == onnx.AttributeProto.GRAPH and not attribute.ref_attr_name


def _constant_names(graph: onnx.GraphProto) -> list[str]:
    return [*(tensor.name for tensor in graph.initializer), *(t.values.name for t in graph.sparse_initializer)]


class LoadedNode(gs.Node):
    """Equal to itself only. Its base compares names, so that rewiring one of two like-named nodes in the branches of an
    If takes the other from the tensor's list of readers.
    """

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


@dataclass(frozen=True)
class _Reader:
    """Walks live objects and messages side by side."""

    folder: DataFolder

    def graph(self, graph: gs.Graph, message: onnx.GraphProto) -> None:
        notes = ScopeNotes(
            metadata={entry.key: entry.value for entry in message.metadata_props},
            quantization_annotation=_copies(message.quantization_annotation),
        )
        vars(graph)[NOTES] = notes
        tensors = _local_tensors(graph)
        declared = len(_constant_names(message))
        constants, graph.inputs = graph.inputs[:declared], graph.inputs[declared:]
        self._entries(notes, tensors, "value_info", message.value_info)
        self._entries(notes, tensors, "input", message.input)
        self._entries(notes, tensors, "output", message.output)
        for index, tensor in enumerate(constants):
            self._constant(notes, tensor, index, message)
        outputs = {id(tensor) for tensor in graph.outputs}
        notes.unused = [
            t for t in tensors.values() if isinstance(t, StoredConstant) and not t.outputs and id(t) not in outputs
        ]
        for node, node_message in zip(graph.nodes, message.node, strict=True):
            self.node(node, node_message)

    def node(self, node: gs.Node, message: onnx.NodeProto) -> None:
        node.__class__ = LoadedNode
        rest = onnx.NodeProto(device_configurations=message.device_configurations)
        if message.doc_string:
            rest.doc_string = message.doc_string
        if message.overload:
            rest.overload = message.overload
        vars(node)[NOTES] = NodeNotes(rest, _attribute_notes(message.attribute))
        if message.metadata_props:
            vars(node)[METADATA] = {entry.key: entry.value for entry in message.metadata_props}
        subgraphs, node.attrs = node.attrs, {}
        for attribute in message.attribute:
            if _is_subgraph(attribute):
                self.graph(subgraphs[attribute.name], attribute.g)
                node.attrs[attribute.name] = subgraphs[attribute.name]
            else:
                node.attrs[attribute.name] = self._value(attribute)

    def function(self, function: gs.Function, message: onnx.FunctionProto) -> None:
        for node, node_message in zip(function.nodes, message.node, strict=True):
            self.node(node, node_message)
        function.attrs = dict.fromkeys(message.attribute)
        function.attrs |= {attribute.name: self._value(attribute) for attribute in message.attribute_proto}
        original = onnx.FunctionProto()
        original.CopyFrom(message)
        attributes = _attribute_notes(message.attribute_proto)
        vars(function)[NOTES] = FunctionNotes(original, attributes)
        again = function_message(function).SerializeToString(deterministic=True)
        vars(function)[NOTES] = FunctionNotes(original, attributes, hashlib.sha256(again).digest())

    def _value(self, attribute: onnx.AttributeProto) -> object:
        """Python value of an attribute: as graphsurgeon has it, messages for the kinds it lacks."""
        if attribute.ref_attr_name:
            return gs.Node.AttributeRef(attribute.ref_attr_name, misc.convert_from_onnx_attr_type(attribute.type))
        if attribute.type == onnx.AttributeProto.TENSOR:
            return StoredConstant(attribute.t.name, StoredValues(attribute.t, self.folder))
        copy = onnx.AttributeProto()
        copy.CopyFrom(attribute)
        if attribute.type == onnx.AttributeProto.UNDEFINED:  # IR version 1 had no types
            return copy
        value = onnx.helper.get_attribute_value(copy)
        if attribute.type == onnx.AttributeProto.STRING:
            return _text(value)
        return [_text(item) for item in value] if isinstance(value, list) else value

    def _constant(self, scope: ScopeNotes, tensor: gs.Tensor, index: int, message: onnx.GraphProto) -> None:
        if isinstance(tensor, StoredConstant):
            return  # a second initializer of the same name: the first one counts
        sparse = index - len(message.initializer)
        values: StoredValues | StoredSparseValues
        rest = onnx.TensorProto()
        if sparse >= 0:
            values = StoredSparseValues(message.sparse_initializer[sparse])
        else:
            stored = message.initializer[index]
            values = StoredValues(stored, self.folder)
            rest.metadata_props.extend(stored.metadata_props)
            if stored.doc_string:
                rest.doc_string = stored.doc_string
        tensor.to_constant(values)
        tensor.__class__ = StoredConstant
        _note(tensor, Entry(scope.token, "initializer", index, rest))

    def _entries(
        self, scope: ScopeNotes, tensors: dict[str, gs.Tensor], section: Section, values: Iterable[onnx.ValueInfoProto]
    ) -> None:
        for index, value in enumerate(_copies(values)):
            tensor = tensors.get(value.name)
            if tensor is None:
                scope.strays.append((index, value))
                continue
            notes = tensor_notes(tensor)
            if isinstance(tensor, gs.Variable) and (notes is None or notes.entries[0].scope is scope.token):
                _describe(tensor, value.type)
            _note(tensor, Entry(scope.token, section, index, value))


def _local_tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Tensors by the name they have in this graph, its own before those of outer graphs."""
    own = chain(graph.inputs, graph.outputs, *(node.outputs for node in graph.nodes))
    tensors: dict[str, gs.Tensor] = {}
    for tensor in chain(own, *(node.inputs for node in graph.nodes)):
        if tensor.name:
            tensors.setdefault(tensor.name, tensor)
    return tensors


def _describe(variable: gs.Variable, message: onnx.TypeProto) -> None:
    """Type and shape, where an earlier entry has not told them."""
    kind = message.WhichOneof("value")
    if kind is None:
        return
    variable.type = kind
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(message, kind)
        if variable.dtype is None and tensor.elem_type:
            variable.dtype = numpy_dtype(tensor.elem_type, f"tensor '{variable.name}'")
        if variable.shape is None and tensor.HasField("shape"):
            variable.shape = tuple(_extent(dim) for dim in tensor.shape.dim)
    elif kind == "sequence_type" and message.sequence_type.elem_type.tensor_type.elem_type:
        element = message.sequence_type.elem_type.tensor_type.elem_type
        variable.dtype = numpy_dtype(element, f"sequence '{variable.name}'")


def _extent(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param if dim.HasField("dim_param") else None


def _note(tensor: gs.Tensor, entry: Entry) -> None:
    notes = tensor_notes(tensor)
    entries = notes.entries if notes else ()
    vars(tensor)[NOTES] = TensorNotes(tensor.name, described(tensor), (*entries, entry))


def _attribute_notes(attributes: Iterable[onnx.AttributeProto]) -> dict[str, onnx.AttributeProto]:
    return {
        attribute.name: onnx.AttributeProto(type=attribute.type, doc_string=attribute.doc_string)
        for attribute in attributes
    }


def _text(value: object) -> object:
    """Strings as text where they are text; some domains keep binary data in them."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


_Message = TypeVar("_Message", bound=Message)


def _copies(messages: Iterable[_Message]) -> list[_Message]:
    copies = []
    for message in messages:
        copy = type(message)()
        copy.CopyFrom(message)
        copies.append(copy)
    return copies
