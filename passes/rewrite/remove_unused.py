"""remove-unused: nodes and initializers that nothing reads go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import reads
from lcpaq_onnx.graph.usage import is_overridable, is_pure, label, remove_nodes
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

__all__ = ["RemoveUnused"]


@dataclass(frozen=True)
class RemoveUnused(RewritePass):
    """Dead code, bodies of control flow included.

    Given:   node → t, and neither a node nor an output of the graph reads t; or an initializer that nothing reads
    Result:  without it
    Kept when the operator is of a domain that nobody here knows: it may have an effect besides its outputs; or the
    initializer is an input too: the interface stays.
    """

    name: ClassVar[str] = "remove-unused"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        functions = {(function.domain, function.name) for function in graph.functions}
        notes: list[Note] = []
        modified = _clean(graph, functions, notes)
        unused = graph.unused_initializers
        kept = [constant for constant in unused if is_overridable(graph, constant)]
        notes += [Note(constant.name, "it is an input of the model too") for constant in kept]
        modified |= len(kept) != len(unused)
        unused[:] = kept
        return PassResult(modified, tuple(notes))


def _clean(graph: gs.Graph, functions: set[tuple[str, str]], notes: list[Note]) -> bool:
    used = {id(tensor) for tensor in graph.outputs}
    gone = set()
    modified = False
    for node in reversed(graph.nodes):
        if not any(id(tensor) in used for tensor in node.outputs):
            if is_pure(node) or (node.domain or "", node.op) in functions:
                gone.add(id(node))
                continue
            notes.append(Note(label(node), f"nothing reads it, but {node.domain}.{node.op} may do more than compute"))
        # Bodies first: what they no longer read, this graph need not compute.
        for body in node.subgraphs():
            modified |= _clean(body, functions, notes)
        used.update(id(tensor) for tensor in reads(node))
    remove_nodes(graph, gone)
    return modified or bool(gone)
