"""look-up-integers: rows of a quantized table are picked before they are scaled, not behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.edit import insert_nodes
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.lookups import LOOKUP_PASS, look_up
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.graph.usage import remove_nodes, returned
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass

__all__ = ["LookUpIntegers"]


@dataclass(frozen=True)
class LookUpIntegers(RewritePass):
    """Scaling the rows in use instead of a whole table, and a table that stays integer in memory.

    Given:   integers W/q → Cast → Mul by scale → W;  Gather(W, indices) → y, one or several
    Result:  Gather(W/q, indices) → y/rows → Cast → Mul by Gather(scale, indices) → y
    Kept when anything but such Gathers of planned layers reads W. Exact: the same products. Run after
    ``round-weights``.
    """

    name: ClassVar[str] = LOOKUP_PASS
    contract: ClassVar[Contract] = "exact"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        nodes = nodes_by_name(graph)
        planned = [nodes[layer.name] for layer in context.needed_plan().layers if facts_of(layer.op).looks_up]
        of_layers = {id(node) for node in planned}
        kept = returned(graph)
        behind: dict[int, list[gs.Node]] = {}
        gone: set[int] = set()
        for node in planned:
            table = node.inputs[0]
            if isinstance(table, gs.Constant) or id(table) in kept:
                continue
            if not all(id(reader) in of_layers and reader.inputs[0] is table for reader in table.outputs):
                continue
            (scaling,) = table.inputs
            cast = scaling.inputs[0].inputs[0]
            gone |= {id(cast), id(scaling)}
            for reader in list(table.outputs):
                behind[id(reader)] = look_up(reader, cast.inputs[0], scaling.inputs[1], self.name)
        insert_nodes(graph, after=behind)
        remove_nodes(graph, gone)
        return PassResult(modified=bool(behind))
