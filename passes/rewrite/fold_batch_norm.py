"""fold-batch-norm: batch normalization, and scales and shifts per channel, move into the layer before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.model import DEFAULT_DOMAINS
from lcpaq_onnx.graph.usage import label, remove_nodes, returned, why_not_fixed
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

from .linear_layer import Affine, Floats, LinearLayer, layer_behind, per_channel

__all__ = ["FoldBatchNorm"]

_FIRST_OPSET = 7
"""Before, BatchNormalization trained by default and Add, Mul, … aligned axes by attributes."""

# What `data ∘ operand` does to each channel; None where it is not affine.
_BINARY: dict[tuple[str, bool], Callable[[Floats], Affine]] = {
    ("Add", True): lambda c: Affine(np.ones_like(c), c),
    ("Add", False): lambda c: Affine(np.ones_like(c), c),
    ("Sub", True): lambda c: Affine(np.ones_like(c), -c),
    ("Sub", False): lambda c: Affine(-np.ones_like(c), c),
    ("Mul", True): lambda c: Affine(c, np.zeros_like(c)),
    ("Mul", False): lambda c: Affine(c, np.zeros_like(c)),
    ("Div", True): lambda c: Affine(1 / c, np.zeros_like(c)),
}
"""Operator and whether the data come first."""


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Computed in float64, rounded once to the type of the weights.

    Given:   Conv, ConvTranspose or Gemm (weight W, bias b or none) → t → BatchNormalization → y
             the same → t → Add, Sub, Mul or Div by a constant per channel → y
             MatMul → [Add] → t → Mul, Div, Sub or another Add by a constant per channel → y
    Result:  layer (weight s·W, bias s·b + shift) → y; the Add behind a MatMul stays, as its bias
    Kept when t has other readers or is returned, W or a parameter is computed, shared or overridable, the
    BatchNormalization trains, a constant does not run along channels, or the result overflows the type of W.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        kept = returned(graph)
        gone = set()
        notes = []
        for node in graph.nodes:
            reason = _fold(graph, node, kept)
            if reason is None:
                continue
            if reason:
                notes.append(Note(label(node), reason))
            else:
                gone.add(id(node))
        remove_nodes(graph, gone)
        return PassResult(bool(gone), tuple(notes))


def _fold(graph: Graph, node: gs.Node, kept: frozenset[int]) -> str | None:
    """Empty once ``node`` is folded and bypassed; None if it is nothing to fold; else why it stays."""
    is_norm = node.op == "BatchNormalization"
    data_index = _data_index(node)
    if data_index is None:
        return None
    data = node.inputs[data_index]
    layer = layer_behind(graph, data.inputs[0], kept) if len(data.inputs) == 1 else None
    if layer is None:
        return f"its input '{data.name}' is not the output of a layer" if is_norm else None
    if isinstance(layer, str):
        return layer
    if layer.bias_is_free and node.op == "Add":
        return None  # it is the bias of its MatMul
    if graph.opset < _FIRST_OPSET:
        return f"opset {graph.opset} is older than {_FIRST_OPSET}, raise it first"
    if len(data.outputs) != 1 or id(data) in kept:
        return f"its input '{data.name}' has other readers"
    affine = _norm(graph, node, layer) if is_norm else _binary(graph, node, data_index, layer)
    if isinstance(affine, str):
        return affine
    (result,) = (tensor for tensor in node.outputs if not tensor.is_empty())
    reason = layer.absorb(affine, f"{result.name}/bias")
    if reason:
        return reason
    writer = data.inputs[0]
    node.inputs.clear()
    node.outputs.clear()
    writer.outputs[next(i for i, output in enumerate(writer.outputs) if output is data)] = result
    return ""


def _data_index(node: gs.Node) -> int | None:
    """Which input the layer's output would be; None if ``node`` is neither a normalization nor affine in one input."""
    if (node.domain or "") not in DEFAULT_DOMAINS:
        return None
    if node.op == "BatchNormalization":
        return 0
    if len(node.inputs) != 2:
        return None
    first_is_data, second_is_data = (not isinstance(tensor, gs.Constant) for tensor in node.inputs)
    if first_is_data == second_is_data or (node.op, first_is_data) not in _BINARY:
        return None
    return 0 if first_is_data else 1


def _norm(graph: Graph, node: gs.Node, layer: LinearLayer) -> Affine | str:
    """BatchNormalization-7 to -15, as an affine function per channel."""
    if node.attrs.get("training_mode", 0) or sum(not tensor.is_empty() for tensor in node.outputs) > 1:
        return "it is in training mode"
    if not node.attrs.get("spatial", 1):
        return "it normalizes each position by itself (spatial=0)"
    if layer.rank is None or layer.rank - layer.trailing != 2:
        return f"the rank of its input is not known to be {layer.trailing + 2}"
    values = []
    for tensor in node.inputs[1:]:
        unfixed = why_not_fixed(graph, tensor)
        if unfixed:
            return f"its parameter {unfixed}"
        assert isinstance(tensor, gs.Constant)
        if tuple(tensor.shape) != (layer.channels,):
            return f"its parameter '{tensor.name}' of shape {list(tensor.shape)} is not [{layer.channels}]"
        values.append(tensor.values.astype(np.float64))
    gamma, beta, mean, variance = values
    with np.errstate(all="ignore"):  # what is not finite is refused when it is absorbed
        scale = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
        return Affine(scale, beta - scale * mean)


def _binary(graph: Graph, node: gs.Node, data_index: int, layer: LinearLayer) -> Affine | str:
    operand = node.inputs[1 - data_index]
    unfixed = why_not_fixed(graph, operand)
    if unfixed:
        return unfixed
    assert isinstance(operand, gs.Constant)
    values = per_channel(operand, layer)
    if values is None:
        return f"'{operand.name}' of shape {list(operand.shape)} is not one number per channel of {label(layer.node)}"
    with np.errstate(all="ignore"):
        return _BINARY[node.op, data_index == 0](values)
