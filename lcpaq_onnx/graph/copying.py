"""Copies of graphs that share payloads only. graphsurgeon's own copy drops what it does not know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.notes import METADATA, NOTES, scope_notes

__all__ = ["Copier"]

_WIRES = ("inputs", "outputs")


class Copier:
    """Copies the objects of one graph; every object once, so that what was shared stays shared."""

    def __init__(self) -> None:
        self._tensors: dict[int, gs.Tensor] = {}

    def tensors(self, tensors: Iterable[gs.Tensor]) -> list[gs.Tensor]:
        """Copies with values, types and notes, not yet wired to nodes."""
        return [self._tensor(tensor) for tensor in tensors]

    def nodes(self, nodes: Iterable[gs.Node]) -> list[gs.Node]:
        """Copies wired to copied tensors."""
        return [self._node(node) for node in nodes]

    def function(self, function: gs.Function) -> gs.Function:
        """A copy of a local function."""
        copy = gs.Function(
            function.name,
            function.domain,
            nodes=self.nodes(function.nodes),
            inputs=self.tensors(function.inputs),
            outputs=self.tensors(function.outputs),
            doc_string=function.doc_string,
            opset=function.opset,
            import_domains=list(function.import_domains or ()),
            attrs=self._attributes(function.attrs),
        )
        if NOTES in vars(function):
            vars(copy)[NOTES] = vars(function)[NOTES]
        return copy

    def add_scope(self, source: gs.Graph, copy: gs.Graph) -> None:
        """Gives ``copy`` the notes of ``source``."""
        notes = scope_notes(source)
        unused = [tensor for tensor in self.tensors(notes.unused) if isinstance(tensor, gs.Constant)]
        annotations, strays = list(notes.quantization_annotation), list(notes.strays)
        vars(copy)[NOTES] = replace(
            notes,
            metadata=dict(notes.metadata),
            quantization_annotation=annotations,
            strays=strays,
            unused=unused,
        )

    def _tensor(self, tensor: gs.Tensor) -> gs.Tensor:
        if id(tensor) not in self._tensors:
            copy: gs.Tensor
            if isinstance(tensor, gs.Constant):
                copy = gs.Constant(tensor.name, tensor._values)
                copy.__class__ = type(tensor)
            else:
                copy = gs.Variable(tensor.name)
            vars(copy).update((key, value) for key, value in vars(tensor).items() if key not in _WIRES)
            self._tensors[id(tensor)] = copy
        return self._tensors[id(tensor)]

    def _node(self, node: gs.Node) -> gs.Node:
        copy = gs.Node(
            node.op,
            node.name,
            attrs=self._attributes(node.attrs),
            inputs=self.tensors(node.inputs),
            outputs=self.tensors(node.outputs),
            domain=node.domain,
        )
        copy.__class__ = type(node)
        own = (*_WIRES, "attrs", METADATA)
        vars(copy).update((key, value) for key, value in vars(node).items() if key not in own)
        if METADATA in vars(node):
            vars(copy)[METADATA] = dict(vars(node)[METADATA])
        return copy

    def _attributes(self, attributes: dict[str, object]) -> dict[str, object]:
        return {name: self._value(value) for name, value in attributes.items()}

    def _value(self, value: object) -> object:
        if isinstance(value, gs.Graph):
            return self._subgraph(value)
        if isinstance(value, gs.Tensor):
            return self._tensor(value)
        return list(value) if isinstance(value, list) else value

    def _subgraph(self, graph: gs.Graph) -> gs.Graph:
        copy = gs.Graph(
            nodes=self.nodes(graph.nodes),
            inputs=self.tensors(graph.inputs),
            outputs=self.tensors(graph.outputs),
            name=graph.name,
            doc_string=graph.doc_string,
            opset=graph.opset,
            import_domains=list(graph.import_domains or ()),
            ir_version=graph.ir_version,
        )
        self.add_scope(graph, copy)
        return copy
