"""stamp-plan: the emitted model says which tool, target and plan made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.pass_base import Contract, PassContext, PassResult, RewritePass
from lcpaq_onnx.provenance import model_metadata

__all__ = ["StampPlan"]


@dataclass(frozen=True)
class StampPlan(RewritePass):
    """Model metadata ``lcpaq.version``, ``lcpaq.target``, ``lcpaq.plan`` (SHA-256 of the plan's JSON).

    Given:   a model
    Result:  the same model with three more entries in metadata_props
    Kept when never; entries of an earlier run are replaced.
    """

    name: ClassVar[str] = "stamp-plan"
    contract: ClassVar[Contract] = "exact"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plan = context.needed_plan()
        entries = model_metadata(plan.target, plan.sha256())
        kept = [entry for entry in graph.header.metadata_props if entry.key not in entries]
        del graph.header.metadata_props[:]
        graph.header.metadata_props.extend(kept)
        for key, value in entries.items():
            graph.header.metadata_props.add(key=key, value=value)
        graph.header.ir_version = max(graph.header.ir_version, plan.ir_version)
        return PassResult(modified=True)
