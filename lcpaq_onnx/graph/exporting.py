"""graphsurgeon objects to messages, always from the live objects; notes add what graphsurgeon has no place for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import SparseValues
from onnx_graphsurgeon.util import misc

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph.constant_uses import Constants, Uses
from lcpaq_onnx.graph.notes import (
    METADATA,
    NodeNotes,
    ScopeNotes,
    Section,
    entry_of,
    function_notes,
    node_notes,
    scope_notes,
    tensor_notes,
)
from lcpaq_onnx.graph.tensors import field_bytes, onnx_dtype, sparse_message, tensor_message
from lcpaq_onnx.graph.value_info import is_as_loaded, value_info_message

__all__ = ["Exporter", "function_message", "node_bytes", "node_message"]

_FIRST_IR_WITH_FIXED_INITIALIZERS = 4
"""Up to IR version 3 every initializer must be a graph input too (ONNX IR.md, "Initializers")."""


@dataclass(frozen=True)
class Exporter:
    """``message``: what a constant is written as, e.g. with its data inside or elsewhere."""

    ir_version: int
    message: Callable[[gs.Constant], onnx.TensorProto] = tensor_message
    uses: Uses = field(default_factory=Uses)

    def graph(self, graph: gs.Graph, outer: Constants) -> onnx.GraphProto:
        """``graph`` with its constants. ``outer``: constants that enclosing graphs declare."""
        result, constants = self.body(graph, outer)
        result.initializer.extend(self.message(constant) for constant in constants)
        return result

    def body(self, graph: gs.Graph, outer: Constants) -> tuple[onnx.GraphProto, list[gs.Constant]]:
        """``graph`` without its dense initializers, and these."""
        scope = scope_notes(graph)
        declared = self.uses.declared(graph, outer)
        _check_names(graph, declared)
        result = onnx.GraphProto(name=graph.name, doc_string=graph.doc_string)
        for text in ("name", "doc_string"):
            if not getattr(result, text):
                result.ClearField(text)
        visible = outer | {id(constant): constant for constant in declared}
        result.node.extend(self.node(node, visible) for node in graph.nodes)
        result.input.extend(self._inputs(graph, scope, declared))
        result.output.extend(_listed(graph.outputs, scope, "output"))
        result.value_info.extend(self._value_infos(graph, scope, declared))
        result.quantization_annotation.extend(_annotations(graph, scope, declared))
        _add_metadata(result, scope.metadata)
        sparse = [constant for constant in declared if isinstance(constant._values, SparseValues)]
        result.sparse_initializer.extend(sparse_message(constant) for constant in sparse)
        return result, [constant for constant in declared if not isinstance(constant._values, SparseValues)]

    def node(self, node: gs.Node, visible: Constants) -> onnx.NodeProto:
        """``node`` with its subgraphs."""
        notes = node_notes(node)
        message = onnx.NodeProto()
        if notes:
            message.CopyFrom(notes.rest)
        message.op_type = node.op
        message.input.extend(tensor.name for tensor in node.inputs)
        message.output.extend(tensor.name for tensor in node.outputs)
        if node.name:
            message.name = node.name
        if node.domain is not None:
            message.domain = node.domain
        message.attribute.extend(self._attributes(node, notes, visible))
        # Read without node_metadata(), which would leave an empty dictionary behind.
        _add_metadata(message, vars(node).get(METADATA, {}))
        return message

    def attribute(
        self, name: str, value: object, stored: onnx.AttributeProto, visible: Constants
    ) -> onnx.AttributeProto:
        """``stored``: the doc string, and the type that ``value`` is meant to have where it leaves that open."""
        if isinstance(value, onnx.AttributeProto):
            return value
        message = self._typed(name, value, stored.type, visible)
        if stored.doc_string:
            message.doc_string = stored.doc_string
        return message

    def _typed(self, name: str, value: object, kind: int, visible: Constants) -> onnx.AttributeProto:
        types = onnx.AttributeProto
        if isinstance(value, gs.Node.AttributeRef):
            kind = kind or misc.convert_to_onnx_attr_type(value.type)
            return types(name=name, type=types.AttributeType.Name(kind), ref_attr_name=value.name)
        if isinstance(value, gs.Constant):
            value = self.message(value)
        elif isinstance(value, gs.Graph):
            value = self.graph(value, visible)
        elif isinstance(value, type):
            value = onnx_dtype(value, f"attribute '{name}'")
        is_empty_list = isinstance(value, (list, tuple)) and not value
        try:
            message = onnx.helper.make_attribute(name, value, attr_type=kind if is_empty_list and kind else None)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"attribute '{name}' cannot be written: {error}",
                hint="give it the type that its operator asks for",
            ) from error
        if (message.type, kind) == (types.INT, types.FLOAT):
            return onnx.helper.make_attribute(name, float(message.i))
        if (message.type, kind) == (types.INTS, types.FLOATS):
            return onnx.helper.make_attribute(name, [float(item) for item in message.ints])
        return message

    def _attributes(self, node: gs.Node, notes: NodeNotes | None, visible: Constants) -> Iterator[onnx.AttributeProto]:
        for name, value in node.attrs.items():
            stored = notes.attributes.get(name) if notes else None
            yield self.attribute(name, value, stored or _schema_attribute(node, name), visible)

    def _inputs(
        self, graph: gs.Graph, scope: ScopeNotes, declared: Iterable[gs.Constant]
    ) -> Iterator[onnx.ValueInfoProto]:
        """Graph inputs, with initializers that may be overridden in the places they had."""
        overridable: list[tuple[float, gs.Tensor]] = []
        for constant in declared:
            entry = entry_of(constant, scope, "input")
            new = entry_of(constant, scope, "initializer") is None
            if entry:
                overridable.append((entry.index, constant))
            elif new and self.ir_version < _FIRST_IR_WITH_FIXED_INITIALIZERS:
                overridable.append((float("inf"), constant))
        overridable.sort(key=lambda place: place[0])
        for tensor in graph.inputs:
            entry = entry_of(tensor, scope, "input")
            while entry and overridable and overridable[0][0] < entry.index:
                yield from _listed([overridable.pop(0)[1]], scope, "input")
            yield from _listed([tensor], scope, "input")
        yield from _listed((tensor for _, tensor in overridable), scope, "input")

    def _value_infos(
        self, graph: gs.Graph, scope: ScopeNotes, declared: Iterable[gs.Constant]
    ) -> Iterator[onnx.ValueInfoProto]:
        """Those of the file in their order, of tensors still here; then those of new or newly typed tensors."""
        placed = list(scope.strays)
        fresh = []
        listed = {id(tensor) for tensor in chain(graph.inputs, graph.outputs)}
        made = {id(tensor) for node in graph.nodes for tensor in node.outputs}
        for tensor in _live_tensors(graph, declared):
            entry = entry_of(tensor, scope, "value_info")
            folded = isinstance(tensor, gs.Constant) and not entry_of(tensor, scope, "initializer")
            if entry and not folded and (tensor.dtype is not None or is_as_loaded(tensor)):
                assert isinstance(entry.message, onnx.ValueInfoProto)
                placed.append((entry.index, value_info_message(tensor, entry.message)))
            elif isinstance(tensor, gs.Variable) and id(tensor) in made - listed and tensor.dtype is not None:
                stale = tensor_notes(tensor) is None or not is_as_loaded(tensor)
                fresh += [value_info_message(tensor, None)] if stale else []
        placed.sort(key=lambda place: place[0])
        yield from (message for _, message in placed)
        yield from fresh


def function_message(function: gs.Function) -> onnx.FunctionProto:
    """``function``, verbatim if nothing in it was changed."""
    notes = function_notes(function)
    message = _rebuilt_function(function)
    if notes and hashlib.sha256(message.SerializeToString(deterministic=True)).digest() == notes.digest:
        return notes.original
    return message


def node_bytes(node: gs.Node) -> int:
    """Exact bytes of ``node`` in a GraphProto (tag, length, NodeProto) with the constants that only its subgraphs use,
    but not those it reads itself.
    """
    return field_bytes(node_message(node).ByteSize())


def node_message(node: gs.Node) -> onnx.NodeProto:
    """``node`` alone, with the constants that only its subgraphs use."""
    uses = Uses()
    outer = uses.declared_outside(node)
    return Exporter(onnx.IR_VERSION, uses=uses).node(node, outer)


def _rebuilt_function(function: gs.Function) -> onnx.FunctionProto:
    notes = function_notes(function)
    message = onnx.FunctionProto(name=function.name, domain=function.domain)
    if notes:
        message.value_info.extend(notes.original.value_info)
        message.metadata_props.extend(notes.original.metadata_props)
        if notes.original.overload:
            message.overload = notes.original.overload
    if function.doc_string:
        message.doc_string = function.doc_string
    message.input.extend(tensor.name for tensor in function.inputs)
    message.output.extend(tensor.name for tensor in function.outputs)
    message.opset_import.extend(function.import_domains or ())
    exporter = Exporter(onnx.IR_VERSION)
    # A function has no initializers: constants that nodes read come from Constant nodes.
    constants = exporter.uses.of(function)
    for constant in constants.values():
        node = message.node.add(op_type="Constant", output=[constant.name])
        node.attribute.append(onnx.helper.make_attribute("value", tensor_message(constant)))
    message.node.extend(exporter.node(node, constants) for node in function.nodes)
    for name, value in function.attrs.items():
        if value is None:
            message.attribute.append(name)
            continue
        stored = notes.attributes.get(name) if notes else None
        message.attribute_proto.append(exporter.attribute(name, value, stored or onnx.AttributeProto(), {}))
    return message


def _listed(tensors: Iterable[gs.Tensor], scope: ScopeNotes, section: Section) -> Iterator[onnx.ValueInfoProto]:
    for tensor in tensors:
        entry = entry_of(tensor, scope, section)
        stored = entry.message if entry else None
        assert stored is None or isinstance(stored, onnx.ValueInfoProto)
        yield value_info_message(tensor, stored)


def _live_tensors(graph: gs.Graph, declared: Iterable[gs.Constant]) -> list[gs.Tensor]:
    wired = chain.from_iterable(chain(node.inputs, node.outputs) for node in graph.nodes)
    everything = chain(graph.inputs, declared, wired, graph.outputs)
    return list({id(tensor): tensor for tensor in everything if tensor.name}.values())


def _annotations(
    graph: gs.Graph, scope: ScopeNotes, declared: Iterable[gs.Constant]
) -> Iterator[onnx.TensorAnnotation]:
    """Quantization annotations refer to tensors by name: follow renamed tensors, forget removed ones."""
    if not scope.quantization_annotation:
        return
    noted = ((tensor, tensor_notes(tensor)) for tensor in _live_tensors(graph, declared))
    names = {notes.name if notes else tensor.name: tensor.name for tensor, notes in noted}
    for stored in scope.quantization_annotation:
        if stored.tensor_name not in names:
            continue
        message = onnx.TensorAnnotation()
        message.CopyFrom(stored)
        message.tensor_name = names[stored.tensor_name]
        for parameter in message.quant_parameter_tensor_names:
            parameter.value = names.get(parameter.value, parameter.value)
        yield message


def _check_names(graph: gs.Graph, declared: Iterable[gs.Constant]) -> None:
    owner: dict[str, gs.Tensor] = {}
    for tensor in chain(declared, graph.inputs, chain.from_iterable(node.outputs for node in graph.nodes)):
        if tensor.name and owner.setdefault(tensor.name, tensor) is not tensor:
            raise ModelError(
                f"graph '{graph.name}': two different tensors are called '{tensor.name}'", hint="rename one of them"
            )


def _add_metadata(message: onnx.GraphProto | onnx.NodeProto, metadata: Mapping[str, str]) -> None:
    message.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in metadata.items())


def _schema_attribute(node: gs.Node, name: str) -> onnx.AttributeProto:
    """Type of an attribute by the newest schema of its operator (types never changed); without one, none."""
    domain = node.domain or ""
    if not onnx.defs.has(node.op, domain):
        return onnx.AttributeProto()
    attribute = onnx.defs.get_schema(node.op, domain).attributes.get(name)
    if attribute is None:
        return onnx.AttributeProto()
    kind = int(attribute.type)  # type: ignore[call-overload]  # an IntEnum; its stub omits the base
    return onnx.AttributeProto(type=onnx.AttributeProto.AttributeType.Name(kind))
