"""inline-if: an If whose condition is a constant becomes the branch it always takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.model import DEFAULT_DOMAINS
from lcpaq_onnx.graph.usage import (
    all_tensors,
    detach,
    label,
    replace_tensor,
    returned,
    scopes,
    unique_name,
    why_not_fixed,
)
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

__all__ = ["InlineIf"]


@dataclass(frozen=True)
class InlineIf(RewritePass):
    """In all scopes, and again in what was inlined.

    Given:   constant → If (then: nodes T, else: nodes E) → y
    Result:  nodes T (or E) → y. Names that are taken elsewhere get ``#2``; constants of the branch come along. An
             output that a branch only passes on is read from where it comes from, or, if returned, through an Identity.
    Kept when the condition is computed, or a caller may override it.
    """

    name: ClassVar[str] = "inline-if"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        inliner = _Inliner(graph)
        inliner.scope(graph)
        return PassResult(inliner.modified, tuple(inliner.notes))


class _Inliner:
    """One run."""

    def __init__(self, graph: Graph) -> None:
        self.modified = False
        self.notes: list[Note] = []
        self._graph = graph

    def scope(self, scope: gs.Graph) -> None:
        """Inline the Ifs of one graph or body, then those in the bodies of what remains."""
        position = 0
        while position < len(scope.nodes):
            node = scope.nodes[position]
            branch = self._branch(node)
            if branch is None:
                position += 1
                continue
            self.modified = True
            scope.nodes[position : position + 1] = self._inlined(node, branch)
        for node in scope.nodes:
            for body in node.subgraphs():
                self.scope(body)

    def _branch(self, node: gs.Node) -> gs.Graph | None:
        if node.op != "If" or (node.domain or "") not in DEFAULT_DOMAINS:
            return None
        (condition,) = node.inputs
        reason = why_not_fixed(self._graph, condition)
        if reason:
            self.notes.append(Note(label(node), f"its condition {reason}"))
            return None
        assert isinstance(condition, gs.Constant)
        branch = node.attrs["then_branch" if np.asarray(condition.values).item() else "else_branch"]
        assert isinstance(branch, gs.Graph)
        return branch

    def _inlined(self, node: gs.Node, branch: gs.Graph) -> list[gs.Node]:
        """Nodes of ``branch``, writing and reading what ``node``, which becomes a shell, wrote and read."""
        results = list(node.outputs)
        node.attrs = {name: value for name, value in node.attrs.items() if value is not branch}
        detach(node)
        node.attrs = {}
        self._make_names_unique(branch)
        nodes = list(branch.nodes)
        made = {id(tensor) for inner in nodes for tensor in inner.outputs}
        kept = returned(self._graph)
        given: dict[int, gs.Tensor] = {}
        for value, result in zip(branch.outputs, results, strict=True):
            if result.is_empty():
                continue
            if id(value) in made and id(value) not in given:
                (writer,) = value.inputs
                writer.outputs[next(i for i, output in enumerate(writer.outputs) if output is value)] = result
                replace_tensor(self._graph, value, result)
                given[id(value)] = result
                continue
            source = given.get(id(value), value)
            if id(result) in kept:
                name = unique_name(f"{result.name}/Identity", {inner.name for inner in nodes})
                nodes.append(gs.Node("Identity", name, inputs=[source], outputs=[result]))
            else:
                replace_tensor(self._graph, result, source)
        return nodes

    def _make_names_unique(self, branch: gs.Graph) -> None:
        """Of what the branch and bodies in it own, against the rest of the model, where the node no longer is."""
        outside = {id(tensor): tensor for tensor in all_tensors(self._graph)}
        names = {tensor.name for tensor in outside.values()}
        for tensor in all_tensors(branch):
            if id(tensor) not in outside:
                tensor.name = unique_name(tensor.name, names)
                names.add(tensor.name)
        node_names = {node.name for scope in scopes(self._graph) for node in scope.nodes}
        for inner in (inner for scope in scopes(branch) for inner in scope.nodes):
            if inner.name:
                inner.name = unique_name(inner.name, node_names)
                node_names.add(inner.name)
