"""Edits that passes share. Graphs stay topologically sorted; names of what is replaced live on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph

__all__ = ["constant_to_variable", "insert_nodes", "redirect_readers", "split_writer"]


def constant_to_variable(tensor: gs.Constant) -> gs.Variable:
    """Turn a constant into a variable in place: whoever read it reads what a new node will write."""
    tensor.to_variable()
    variable: gs.Tensor = tensor
    assert isinstance(variable, gs.Variable)
    # No type: new tensors carry no value_info, runtimes infer it.
    variable.dtype = None
    variable.shape = None
    return variable


def split_writer(tensor: gs.Tensor, source: gs.Variable) -> None:
    """Let the node that writes ``tensor`` write ``source`` instead; readers of ``tensor`` stay with it."""
    (writer,) = tensor.inputs
    position = next(i for i, output in enumerate(writer.outputs) if output is tensor)
    writer.outputs[position] = source


def redirect_readers(readers: Sequence[gs.Node], tensor: gs.Tensor, result: gs.Tensor) -> None:
    """Let ``readers`` read ``result`` wherever they read ``tensor``."""
    for reader in readers:
        for position, value in enumerate(reader.inputs):
            if value is tensor:
                reader.inputs[position] = result


def insert_nodes(
    graph: Graph,
    *,
    first: Sequence[gs.Node] = (),
    before: Mapping[int, Sequence[gs.Node]] = {},
    after: Mapping[int, Sequence[gs.Node]] = {},
) -> None:
    """Insert new nodes in one go: ``first`` at the start, the others next to the node with that ``id()``."""
    nodes = list(first)
    for node in graph.nodes:
        nodes += before.get(id(node), ())
        nodes.append(node)
        nodes += after.get(id(node), ())
    graph.nodes = nodes
