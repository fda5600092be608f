"""raise-opset: the same model in a newer operator set, which can say more: int4 from 21 on, int2 from 25 on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.opset import raise_opset
from lcpaq_onnx.manager.pass_base import PassContext, PassResult, RewritePass

__all__ = ["RaiseOpset"]


@dataclass(frozen=True)
class RaiseOpset(RewritePass):
    """By onnx's version converter. Fails where that cannot carry the model over; targets then use older forms.

    Given:   a model of an opset below ``to``
    Result:  the same names in opset ``to``, and in the least IR version that knows it or its own, if newer; operators
             that mean something else now are preceded by new Constant, Reshape, … nodes without names
    Kept when the model is of opset ``to`` or a newer one.
    """

    name: ClassVar[str] = "raise-opset"

    to: int

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if graph.opset >= self.to:
            return PassResult(modified=False)
        raise_opset(graph, self.to)
        return PassResult(modified=True)
