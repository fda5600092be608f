"""Which nodes are layers: the data and the constant weights that they read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.ops import facts_of

__all__ = ["has_other_readers", "operands_of"]

# Probes hand indices on as float32, which is exact for whole numbers up to here.
_MOST_ROWS = 1 << 24


def has_other_readers(graph: Graph, op: str, weight: gs.Tensor, dtypes: Mapping[str, np.dtype]) -> bool:
    """Whether the graph returns ``weight``, or anything reads it but layers of the kind of ``op`` (lookups or not)."""
    top_level = {id(node) for node in graph.nodes}
    is_returned = any(weight is output for output in graph.outputs)
    return is_returned or any(
        id(node) not in top_level
        or facts_of(node.op).looks_up != facts_of(op).looks_up
        or (operands := operands_of(node, dtypes)) is None
        or operands[1] is not weight
        for node in weight.outputs
    )


def operands_of(node: gs.Node, dtypes: Mapping[str, np.dtype]) -> tuple[gs.Tensor, gs.Tensor] | None:
    """Data and weight of a node that is a layer."""
    facts = facts_of(node.op, node.domain)
    if facts.looks_up:
        return (node.inputs[1], node.inputs[0]) if _is_table_lookup(node, dtypes) else None
    if facts.weight_input is None or len(node.inputs) <= facts.weight_input:
        return None
    data, weight = node.inputs[0], node.inputs[facts.weight_input]
    return (data, weight) if _is_float_weight(weight) and dtypes.get(data.name) == np.float32 else None


def _is_table_lookup(node: gs.Node, dtypes: Mapping[str, np.dtype]) -> bool:
    """Whether ``node`` picks rows (axis 0) of a constant float table by indices that it is given."""
    table, indices = node.inputs
    return (
        _is_float_weight(table)
        and int(node.attrs.get("axis", 0)) % len(table.shape) == 0
        and int(table.shape[0]) <= _MOST_ROWS
        and not isinstance(indices, gs.Constant)
        and dtypes.get(indices.name) in (np.int32, np.int64)
    )


def _is_float_weight(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and len(tensor.shape) >= 2
