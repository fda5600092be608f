"""A graph as text for people: ONNX's syntax, large constants left out, nodes marked with the pass that made them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
import onnx.printer

from lcpaq_onnx.graph.emit import PASS_KEY
from lcpaq_onnx.graph.graph_io import Graph, to_proto

__all__ = ["graph_text"]


def graph_text(graph: Graph, *, elide_above: int = 8) -> str:
    """``graph`` in the syntax of ``onnx.printer``; a constant of more than ``elide_above`` elements is written ``...``.

    A node made by a pass is named ``name (pass)``, e.g. ``conv/w/Quantize (insert-qdq)``.
    """
    model = to_proto(graph)
    for scope in _scopes(model):
        for tensor in _tensors(scope):
            if math.prod(tensor.dims) > elide_above:
                head = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
                tensor.CopyFrom(head)
        for node in scope.node:
            made_by = [entry.value for entry in node.metadata_props if entry.key == PASS_KEY]
            if made_by:
                node.name = f"{node.name} ({made_by[0]})"
    lines = str(onnx.printer.to_text(model)).replace("=  {}", "= ...").splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _scopes(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    pending: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while pending:
        scope = pending.pop()
        yield scope
        for node in scope.node:
            for attribute in node.attribute:
                pending += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs


def _tensors(scope: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    if isinstance(scope, onnx.GraphProto):
        yield from scope.initializer
    for node in scope.node:
        yield from (attribute.t for attribute in node.attribute if attribute.type == onnx.AttributeProto.TENSOR)
