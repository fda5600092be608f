"""Which graph declares which constant: graphsurgeon has no such lists and declares one in every graph that uses it."""

from __future__ import annotations

from itertools import chain

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.notes import entry_of, scope_notes, tensor_notes

__all__ = ["Constants", "Uses"]

Constants = dict[int, gs.Constant]
"""Constants by ``id``: gs.Tensor compares by name, and two graphs may use one name for different constants."""


class Uses:
    """Constants each graph uses; remembers them per graph, so it serves for one export of an unchanging graph."""

    def __init__(self) -> None:
        self._uses: dict[int, Constants] = {}

    def of(self, graph: gs.Graph) -> Constants:
        """Constants that ``graph`` or its subgraphs read or return, by first use."""
        if id(graph) not in self._uses:
            uses = _direct(graph)
            for subgraph in _inner_graphs(graph):
                uses |= self.of(subgraph)
            self._uses[id(graph)] = uses
        return self._uses[id(graph)]

    def declared(self, graph: gs.Graph, outer: Constants) -> list[gs.Constant]:
        """Constants to declare in ``graph``, given those of outer graphs: where the file declared them, else in the
        innermost graph around all uses. Ones that were unused at load come too. In the order of the file, then of use.
        """
        scope = scope_notes(graph)
        direct = _direct(graph)
        inner = [self.of(subgraph) for subgraph in _inner_graphs(graph)]
        chosen = {id(constant): constant for constant in scope.unused} | {
            key: constant
            for key, constant in self.of(graph).items()
            if key not in outer
            and (key in direct or sum(key in uses for uses in inner) > 1 or entry_of(constant, scope, "initializer"))
        }
        places = [(constant, entry_of(constant, scope, "initializer")) for constant in chosen.values()]
        placed = sorted(
            ((entry.index, constant) for constant, entry in places if entry is not None), key=lambda place: place[0]
        )
        return [constant for _, constant in placed] + [constant for constant, entry in places if entry is None]

    def declared_outside(self, node: gs.Node) -> Constants:
        """Constants that the subgraphs of ``node`` use but leave to outer graphs: others read them too, or the file
        declared them there.
        """
        graphs = [graph for graph in node.attrs.values() if isinstance(graph, gs.Graph)]
        nested = [*graphs, *(inner for graph in graphs for inner in graph.subgraphs(recursive=True))]
        readers = {id(reader) for graph in nested for reader in graph.nodes}
        scopes = [scope_notes(graph) for graph in nested]
        used = dict(chain.from_iterable(self.of(graph).items() for graph in graphs))
        return {
            key: constant
            for key, constant in used.items()
            if not any(entry_of(constant, scope, "initializer") for scope in scopes)
            and (
                any(id(reader) not in readers for reader in constant.outputs)
                or sum(key in self.of(graph) for graph in graphs) > 1
                or _declared_in_a_file(constant)
            )
        }


def _direct(graph: gs.Graph) -> Constants:
    read = chain(chain.from_iterable(node.inputs for node in graph.nodes), graph.outputs)
    return {id(tensor): tensor for tensor in read if isinstance(tensor, gs.Constant)}


def _inner_graphs(graph: gs.Graph) -> list[gs.Graph]:
    return list(graph.subgraphs())


def _declared_in_a_file(constant: gs.Constant) -> bool:
    notes = tensor_notes(constant)
    return notes is not None and any(entry.section == "initializer" for entry in notes.entries)
