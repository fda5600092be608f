"""Who uses a tensor, and is its value known for good: questions that every rewrite asks before it touches one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set
from itertools import chain

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.model import DEFAULT_DOMAINS, Graph
from lcpaq_onnx.graph.notes import entry_of, scope_notes

__all__ = [
    "all_tensors",
    "detach",
    "is_overridable",
    "is_pure",
    "label",
    "remove_nodes",
    "replace_tensor",
    "returned",
    "scopes",
    "unique_name",
    "unwire",
    "why_not_fixed",
]

_FIRST_IR_WITH_OVERRIDING = 4
"""Before, initializers had to be inputs too, and that said nothing (ONNX IR.md, "Initializers")."""

_PURE_DOMAINS = (*DEFAULT_DOMAINS, "ai.onnx.ml", "com.microsoft")


def scopes(graph: gs.Graph) -> list[gs.Graph]:
    """The graph and all bodies of control flow in it, outer ones first; local functions are not among them."""
    found = [graph]
    for scope in found:
        found.extend(scope.subgraphs())
    return found


def all_tensors(graph: gs.Graph) -> list[gs.Tensor]:
    """Tensors of all scopes, each once, in graph order."""
    found = chain.from_iterable(_wired(scope) for scope in scopes(graph))
    unused = scope_notes(graph).unused
    return list({id(tensor): tensor for tensor in chain(found, unused) if not tensor.is_empty()}.values())


def returned(graph: gs.Graph) -> frozenset[int]:
    """``id`` of every tensor that the graph or a body returns; that is a use which ``tensor.outputs`` does not list."""
    return frozenset(id(tensor) for scope in scopes(graph) for tensor in scope.outputs)


def is_overridable(graph: Graph, constant: gs.Constant) -> bool:
    """Whether a caller may feed another value: the initializer is an input too, and the IR version lets that count."""
    return graph.ir_version >= _FIRST_IR_WITH_OVERRIDING and bool(entry_of(constant, scope_notes(graph), "input"))


def why_not_fixed(graph: Graph, tensor: gs.Tensor) -> str:
    """Why the value of ``tensor`` is not known for good; empty when it is."""
    if not isinstance(tensor, gs.Constant):
        return f"'{tensor.name}' is computed at run time"
    if is_overridable(graph, tensor):
        return f"'{tensor.name}' is also an input of the model, so a caller may feed other values"
    return ""


def is_pure(node: gs.Node) -> bool:
    """Whether ``node`` only computes its outputs; unknown for domains other than ONNX's and ONNX Runtime's."""
    return (node.domain or "") in _PURE_DOMAINS


def label(node: gs.Node) -> str:
    """What to call ``node`` in a message, named or not."""
    written = next((tensor.name for tensor in node.outputs if not tensor.is_empty()), "")
    return node.name or (f"{node.op}:{written}" if written else node.op)


def unique_name(base: str, taken: Collection[str]) -> str:
    """``base``, or ``base#2``, ``base#3``, … : the first that is not taken."""
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}#{count}"
    return name


def detach(node: gs.Node) -> None:
    """Take ``node``, and all that its bodies hold, off their tensors."""
    for inner in (node, *chain.from_iterable(body.nodes for body in node.subgraphs(recursive=True))):
        unwire(inner)


def unwire(node: gs.Node) -> None:
    """Take ``node`` itself off its tensors. The lists' own clear() would look for an equal node, and sibling bodies may
    hold equal ones.
    """
    for tensor in node.inputs:
        _forget(tensor.outputs, node)
    for tensor in node.outputs:
        _forget(tensor.inputs, node)
    list.clear(node.inputs)
    list.clear(node.outputs)


def remove_nodes(graph: gs.Graph, gone: Set[int]) -> None:
    """Take the nodes with these ``id()`` out of ``graph`` and off their tensors."""
    for node in graph.nodes:
        if id(node) in gone:
            detach(node)
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]


def replace_tensor(graph: gs.Graph, tensor: gs.Tensor, result: gs.Tensor) -> None:
    """Let everything that reads ``tensor`` read ``result``: nodes of all scopes, and bodies that return it. Outputs of
    ``graph`` itself stay, they are its interface.
    """
    for reader in list({id(node): node for node in tensor.outputs}.values()):
        for position, value in enumerate(reader.inputs):
            if value is tensor:
                reader.inputs[position] = result
    for body in scopes(graph)[1:]:
        body.outputs = [result if output is tensor else output for output in body.outputs]


def _wired(graph: gs.Graph) -> Iterator[gs.Tensor]:
    ends: Iterable[Iterable[gs.Tensor]] = (chain(node.inputs, node.outputs) for node in graph.nodes)
    return chain(graph.inputs, chain.from_iterable(ends), graph.outputs)


def _forget(listed: list[gs.Node], node: gs.Node) -> None:
    list.pop(listed, next(index for index, entry in enumerate(listed) if entry is node))
