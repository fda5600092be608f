"""fold-constants: weights and shapes that are hidden behind constant expressions become initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.constant_folding import SizeLimit, evaluate, is_constant_node, lift_constant, stored_bytes
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.usage import label, remove_nodes, replace_tensor, returned, scopes, why_not_fixed
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

__all__ = ["FoldConstants"]


@dataclass(frozen=True)
class FoldConstants(RewritePass):
    """One sweep in graph order, which is a fixpoint: a folded constant is one for the nodes behind it.

    Given:   Constant → W;  or constants → Transpose, Reshape, Cast, Mul, … → W
    Result:  initializer W. The result of an Identity is its input, so what was shared stays shared. In bodies of
             control flow only Constant nodes go.
    Kept when the graph or a body returns W, an input may be overridden by a caller, the operator stores quantized
    values or is not known to be deterministic, or the result takes more than ``growth`` times the bytes of the inputs
    and more than ``small_bytes``.
    """

    name: ClassVar[str] = "fold-constants"

    growth: float = 2.0
    small_bytes: int = 4096

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        notes: list[Note] = []
        kept = returned(graph)
        modified = False
        for scope in scopes(graph):
            gone = set()
            for node in scope.nodes:
                if not _is_candidate(node, top_level=scope is graph):
                    continue
                reason = self._fold(graph, node, kept, notes)
                if reason:
                    notes.append(Note(label(node), reason))
                else:
                    gone.add(id(node))
            remove_nodes(scope, gone)
            modified |= bool(gone)
        return PassResult(modified, tuple(notes))

    def _fold(self, graph: Graph, node: gs.Node, kept: frozenset[int], notes: list[Note]) -> str:
        """Makes constants of the outputs; or gives the reason why not."""
        outputs = [tensor for tensor in node.outputs if not tensor.is_empty()]
        answer = next((tensor for tensor in outputs if id(tensor) in kept), None)
        if answer is not None:
            return f"'{answer.name}' is returned, and what is returned needs a node"
        if is_constant_node(node):
            return "" if lift_constant(node) else "its value is of an unknown kind"
        unfixed = next(filter(None, (why_not_fixed(graph, t) for t in node.inputs if not t.is_empty())), "")
        if unfixed:
            return unfixed
        if node.op == "Identity":
            replace_tensor(graph, outputs[0], node.inputs[0])
            return ""
        evaluation = evaluate(graph, node, SizeLimit(self.growth, self.small_bytes))
        if evaluation.reason:
            return evaluation.reason
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and len(tensor.outputs) > 1 and stored_bytes(tensor) > self.small_bytes:
                notes.append(Note(label(node), f"'{tensor.name}' has other readers, so the file holds it twice now"))
        node.outputs.clear()
        for tensor, values in zip(outputs, evaluation.values, strict=True):
            tensor.to_constant(values)
        return ""


def _is_candidate(node: gs.Node, *, top_level: bool) -> bool:
    """Constant nodes, and at top level nodes that read nothing but constants."""
    if is_constant_node(node):
        return True
    read = [tensor for tensor in node.inputs if not tensor.is_empty()]
    return top_level and bool(read) and all(isinstance(tensor, gs.Constant) for tensor in read)
