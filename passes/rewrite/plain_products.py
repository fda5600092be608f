"""plain-products: products with constant weights take the form that integer kernels know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.model import DEFAULT_DOMAINS
from lcpaq_onnx.graph.usage import label, returned, why_not_fixed
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

__all__ = ["PlainProducts"]


@dataclass(frozen=True)
class PlainProducts(RewritePass):
    """Integer kernels know no factors, and no scale per column of a weight with more axes than a matrix.

    Given:   Gemm(x, W, b) with factors alpha and beta
    Result:  Gemm(x, alpha·W, beta·b), multiplied in float64 and rounded once
    Given:   MatMul(x, W [1, …, K, N]) with x of as many axes at least
    Result:  MatMul(x, W [K, N])
    Kept when W or b is computed, shared or overridable, a product overflows, or nothing tells how many axes x has.
    """

    name: ClassVar[str] = "plain-products"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        kept = returned(graph)
        notes = []
        modified = False
        for node in graph.nodes:
            if (node.domain or "") not in DEFAULT_DOMAINS or len(node.inputs) < 2:
                continue
            if _has_factors(node):
                reason = _fold_factors(graph, node, kept)
            elif _has_unit_axes(node):
                reason = _drop_unit_axes(graph, node, kept)
            else:
                continue
            modified |= not reason
            if reason:
                notes.append(Note(label(node), reason))
        return PassResult(modified, tuple(notes))


def _has_factors(node: gs.Node) -> bool:
    return node.op == "Gemm" and (_factor(node, "alpha") != 1 or (_has_bias(node) and _factor(node, "beta") != 1))


def _has_bias(node: gs.Node) -> bool:
    return len(node.inputs) > 2 and not node.inputs[2].is_empty()


def _factor(node: gs.Node, name: str) -> float:
    return float(node.attrs.get(name, 1.0))


def _fold_factors(graph: Graph, node: gs.Node, kept: frozenset[int]) -> str:
    """Gemm-13 with factors; or the reason why not."""
    names = {1: "alpha", **({2: "beta"} if _has_bias(node) else {})}
    operands = {index: name for index, name in names.items() if _factor(node, name) != 1}
    folded = {}
    for index, name in operands.items():
        reason = _why_not_own(graph, node.inputs[index], kept)
        if reason:
            return reason
        values = _values(node.inputs[index])
        with np.errstate(over="ignore"):  # looked for below
            folded[index] = (values.astype(np.float64) * _factor(node, name)).astype(values.dtype)
        if not np.isfinite(folded[index].astype(np.float64)).all():
            return f"{name} times '{node.inputs[index].name}' does not fit {values.dtype}"
    for index, values in folded.items():
        _set_values(node.inputs[index], values)
    for name in ("alpha", "beta"):
        node.attrs.pop(name, None)
    return ""


def _has_unit_axes(node: gs.Node) -> bool:
    weight = node.inputs[1]
    if node.op != "MatMul" or not isinstance(weight, gs.Constant):
        return False
    return len(weight.shape) > 2 and all(int(extent) == 1 for extent in weight.shape[:-2])


def _drop_unit_axes(graph: Graph, node: gs.Node, kept: frozenset[int]) -> str:
    """MatMul-13 broadcasts the axes before the last two; or the reason why not."""
    data, weight = node.inputs[0], node.inputs[1]
    if data.shape is None:
        return f"the model does not say how many axes '{data.name}' has"
    if len(data.shape) < len(weight.shape):
        return f"'{data.name}' has fewer axes than '{weight.name}'"
    reason = _why_not_own(graph, weight, kept)
    if not reason:
        _set_values(weight, _values(weight).reshape(weight.shape[-2:]))
    return reason


def _values(tensor: gs.Tensor) -> NDArray[Any]:
    assert isinstance(tensor, gs.Constant)
    return tensor.values


def _set_values(tensor: gs.Tensor, values: NDArray[Any]) -> None:
    assert isinstance(tensor, gs.Constant)
    tensor.values = values


def _why_not_own(graph: Graph, tensor: gs.Tensor, kept: frozenset[int]) -> str:
    if reason := why_not_fixed(graph, tensor):
        return reason
    if len(tensor.outputs) != 1 or id(tensor) in kept:
        return f"'{tensor.name}' is shared"
    return ""
