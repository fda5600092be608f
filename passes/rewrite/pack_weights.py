"""pack-weights: integer weights below 8 bits are stored packed and unpacked to int8 when the file is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.edit import constant_to_variable, insert_nodes
from lcpaq_onnx.graph.emit import PACK_PASS
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.packing import pack_planes, unpack_blob, unpack_cast
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass
from lcpaq_onnx.planning.plan import LayerPlan

from .planned import weight_of

__all__ = ["PackWeights"]


@dataclass(frozen=True)
class PackWeights(RewritePass):
    """Packed storage that runtimes fold to int8 constants before they choose kernels.

    Given:   int8 W/q, values within the plan's width
    Result:  int4 or int2 W/q4 → Cast → W/q                                            (storage ``cast``)
             bit planes of all layers of one width → BitShift, Mod, … → Split → W/q    (storage ``packed-bytes``)
    Kept when the plan stores the weight plainly. Exact: the integers are the same.
    """

    name: ClassVar[str] = PACK_PASS
    contract: ClassVar[Contract] = "exact"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plan = context.needed_plan()
        nodes = nodes_by_name(graph)
        first: list[gs.Node] = []
        packed: dict[int, list[tuple[gs.Variable, np.ndarray]]] = {}
        done: set[str] = set()
        for layer in plan.layers:
            if layer.storage not in ("cast", "packed-bytes") or layer.weight in done:
                continue
            done.add(layer.weight)
            stored = _integers(nodes[layer.name], layer)
            integers = np.asarray(stored.values, np.int8)
            result = constant_to_variable(stored)
            if layer.storage == "cast":
                first.append(unpack_cast(integers, layer.qformat.bits, result, self.name))
            else:
                packed.setdefault(layer.qformat.bits, []).append((result, integers))
        for bits, members in sorted(packed.items()):
            padded = [np.pad(values.reshape(-1), (0, -values.size % 8)) for _, values in members]
            pieces = [(result, values.shape) for result, values in members]
            first += unpack_blob(pack_planes(np.concatenate(padded), bits), bits, pieces, self.name)
        insert_nodes(graph, first=first)
        return PassResult(modified=bool(first))


def _integers(node: gs.Node, layer: LayerPlan) -> gs.Constant:
    """The int8 constant W/q behind the weight's DequantizeLinear, or behind its Cast and Mul; or read as it is."""
    looked_up = [tensor for tensor in node.inputs if tensor.name == f"{layer.weight}/q"]
    if looked_up:
        assert isinstance(looked_up[0], gs.Constant)
        return looked_up[0]
    (restore,) = weight_of(node, layer).inputs
    tensor = restore.inputs[0]
    if tensor.inputs:
        tensor = tensor.inputs[0].inputs[0]
    assert isinstance(tensor, gs.Constant)
    return tensor
