"""Rows of a quantized table, picked as integers and scaled behind: the nodes, and the bytes that they take.

Anything before Gather would convert the whole table at every inference: DequantizeLinear of 30,522 x 384 takes 3.7 ms,
picking 128 rows 0.02 ms in float and 0.04 ms this way (ONNX Runtime 1.32).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.byte_counts import weight_bytes
from lcpaq_onnx.graph.emit import ROUND_PASS, made_node, scale_weight
from lcpaq_onnx.graph.graph_io import node_bytes
from lcpaq_onnx.numeric.rounding import QuantizedWeight

__all__ = ["LOOKUP_PASS", "ROWS", "behind_bytes", "look_up", "table_bytes", "writer_bytes"]

LOOKUP_PASS = "look-up-integers"
ROWS = "/rows"
"""What the Gather of integers adds to the name of its result."""


def look_up(node: gs.Node, integers: gs.Tensor, scale: gs.Tensor, made_by: str) -> list[gs.Node]:
    """Let the Gather ``node`` pick rows of ``integers``. Returns what goes behind it: Cast, Gather of ``scale``, Mul.

    ``scale``: constant [rows, 1, …], one for each row of the table, or 0-d.
    """
    indices, result = node.inputs[1], node.outputs[0]
    name = result.name
    rows, floats = gs.Variable(name + ROWS), gs.Variable(f"{name}/floats")
    node.inputs[0], node.outputs[0] = integers, rows
    nodes = [made_node("Cast", f"{name}/Cast", [rows], floats, made_by, to=onnx.TensorProto.FLOAT)]
    if scale.shape:
        scales = gs.Variable(f"{name}/scales")
        nodes.append(made_node("Gather", f"{name}/Scales", [scale, indices], scales, made_by))
        scale = scales
    return [*nodes, made_node("Mul", f"{name}/Scale", [floats, scale], result, made_by)]


def table_bytes(table: str, shape: tuple[int, ...], format: QFormat, storage: str) -> int:
    """Bytes of a table's integers and scales, without what several tables or lookups share."""
    return weight_bytes(table, shape, format, storage, True) - sum(map(node_bytes, _restoring(table, format)))


@lru_cache(maxsize=1 << 10)
def behind_bytes(table: str, indices: str, result: str, format: QFormat) -> int:
    """Bytes of the nodes that ``look_up`` puts behind a Gather, by the names of its operands."""
    return sum(map(node_bytes, _behind(table, indices, result, format)))


@lru_cache(maxsize=1 << 10)
def writer_bytes(table: str, indices: str, result: str, format: QFormat) -> int:
    """Bytes of the one of those nodes that writes the result."""
    return node_bytes(_behind(table, indices, result, format)[-1])


def _behind(table: str, indices: str, result: str, format: QFormat) -> list[gs.Node]:
    cast, scale = _restoring(table, format)
    gather = gs.Node("Gather", inputs=[gs.Variable(table), gs.Variable(indices)], outputs=[gs.Variable(result)])
    return look_up(gather, cast.inputs[0], scale.inputs[1], LOOKUP_PASS)


def _restoring(table: str, format: QFormat) -> list[gs.Node]:
    """Cast and Mul of a table of one number: the text of nodes does not depend on shapes."""
    scale = np.ones(() if format.axis is None else 1, np.float32)
    weight = QuantizedWeight(np.zeros((1, 1), np.int8), scale, QFormat(bits=8, axis=format.axis))
    return scale_weight(weight, gs.Variable(table), ROUND_PASS)
