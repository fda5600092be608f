"""canonical-names: every node has a name of its own, and no tensor one that the quantizing passes will give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.usage import all_tensors, is_overridable, label, scopes, unique_name
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

__all__ = ["CanonicalNames"]

# What `lcpaq_onnx.graph.emit` calls the nodes and tensors that it makes for a tensor `t`: `t/` and one of these.
_RESERVED_PREFIX = "lcpaq/"
_TENSOR_SUFFIXES = frozenset(
    [
        *("f", "q", "dq", "q2", "q4", "scale", "zero_point", "q/flat", "q/begin", "q/end", "q/cut", "q/shape"),
        *("rows", "floats", "scales"),
    ]
)
_NODE_SUFFIXES = frozenset(["Quantize", "Dequantize", "Cast", "Scale", "Scales", "q/Cast", "q/cut", "q/Reshape"])
# A float layer that reads a quantized tensor may get a copy of it, `t/<layer>`, with these of its own.
_COPY_SUFFIXES = ("/scale", "/zero_point", "/Dequantize")


@dataclass(frozen=True)
class CanonicalNames(RewritePass):
    """Plans, reports and selectors name nodes and tensors, across bodies of control flow too.

    Given:   nodes without a name, or several with one name
    Result:  ``Conv:t`` after operator and first output, ``Conv:t#2`` where that is taken
    Given:   a tensor ``t`` and another one, or a node, whose name a quantizing pass would make from it: ``t/q``,
             ``t/scale``, ``t/<node>``, or anything that begins with ``lcpaq/``
    Result:  that one is called ``t/q#2``, or ``model/lcpaq/…``
    Kept when the name is one of its own; inputs and outputs of the model keep theirs whatever it is. The contents of
    local functions are a world apart.
    """

    name: ClassVar[str] = "canonical-names"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        tensors = all_tensors(graph)
        nodes = [node for scope in scopes(graph) for node in scope.nodes]
        reserved = _Reserved.of(tensors, nodes)
        renamed_tensors, notes = _rename_tensors(graph, tensors, reserved)
        renamed_nodes = _rename_nodes(nodes, reserved)
        return PassResult(renamed_tensors or renamed_nodes, tuple(notes))


@dataclass(frozen=True)
class _Reserved:
    """Names that the quantizing passes may give: ``tensors`` and ``variables`` are the names they derive from."""

    tensors: frozenset[str]
    variables: frozenset[str]
    nodes: frozenset[str]

    @classmethod
    def of(cls, tensors: Sequence[gs.Tensor], nodes: Sequence[gs.Node]) -> _Reserved:
        return cls(
            frozenset(tensor.name for tensor in tensors),
            frozenset(tensor.name for tensor in tensors if isinstance(tensor, gs.Variable)),
            frozenset(node.name for node in nodes if node.name),
        )

    def has(self, name: str, suffixes: Set[str]) -> bool:
        """Whether ``name`` is reserved; ``suffixes``: those of tensors or those of nodes."""
        if name.startswith(_RESERVED_PREFIX):
            return True
        cuts = [index for index, letter in enumerate(name) if letter == "/"]
        return any(
            (name[:cut] in self.tensors and name[cut + 1 :] in suffixes)
            or (name[:cut] in self.variables and self._names_copy(name[cut + 1 :]))
            for cut in cuts
        )

    def _names_copy(self, rest: str) -> bool:
        return any(rest.removesuffix(suffix) in self.nodes for suffix in _COPY_SUFFIXES)


def _rename_tensors(graph: Graph, tensors: Sequence[gs.Tensor], reserved: _Reserved) -> tuple[bool, list[Note]]:
    interface = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    taken = {tensor.name for tensor in tensors}
    notes = []
    modified = False
    for tensor in tensors:
        if not reserved.has(tensor.name, _TENSOR_SUFFIXES):
            continue
        if id(tensor) in interface or (isinstance(tensor, gs.Constant) and is_overridable(graph, tensor)):
            notes.append(Note(tensor.name, "a quantizing pass may need this name, but it is part of the interface"))
            continue
        # A number behind it would leave the reserved prefix in front.
        base = f"model/{tensor.name}" if tensor.name.startswith(_RESERVED_PREFIX) else tensor.name
        tensor.name = unique_name(base, taken)
        taken.add(tensor.name)
        modified = True
    return modified, notes


def _rename_nodes(nodes: Sequence[gs.Node], reserved: _Reserved) -> bool:
    count = Counter(node.name for node in nodes)
    keeps = {name for name, uses in count.items() if name and uses == 1 and not reserved.has(name, _NODE_SUFFIXES)}
    taken = set(keeps)
    modified = False
    for node in nodes:
        if node.name in keeps:
            continue
        derived = label(gs.Node(node.op, outputs=[gs.Variable(tensor.name) for tensor in node.outputs]))
        node.name = unique_name(derived, taken)
        taken.add(node.name)
        modified = True
    return modified
