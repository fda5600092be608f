"""remove-dropout: a rewriting pass in a package of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.usage import label, remove_nodes, replace_tensor, returned
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

__all__ = ["RemoveDropout"]


@dataclass(frozen=True)
class RemoveDropout(RewritePass):
    """Dropout does nothing at inference.

    Given:   t → Dropout → u → consumers
    Result:  t → consumers
    Kept when the node has a training_mode input (ONNX Dropout-12: it may be true), when its mask is read, or when the
    model returns u (outputs keep their names).
    """

    name: ClassVar[str] = "remove-dropout"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        outputs = returned(graph)
        dropouts = [node for node in graph.nodes if node.op == "Dropout" and not node.domain]
        reasons = {id(node): _why_kept(node, outputs) for node in dropouts}
        gone = [node for node in dropouts if not reasons[id(node)]]
        notes = tuple(Note(label(node), reasons[id(node)]) for node in dropouts if reasons[id(node)])
        for node in gone:
            replace_tensor(graph, node.outputs[0], node.inputs[0])
        remove_nodes(graph, {id(node) for node in gone})
        return PassResult(modified=bool(gone), notes=notes)


def _why_kept(node: gs.Node, outputs: frozenset[int]) -> str:
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        return "training_mode is given"
    if any(mask.outputs or id(mask) in outputs for mask in node.outputs[1:]):
        return "its mask is read"
    return "the model returns its result" if id(node.outputs[0]) in outputs else ""
