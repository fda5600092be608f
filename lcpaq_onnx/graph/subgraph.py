"""Parts of a model as models of their own: with extra outputs, or only what depends on one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.tables import RecordedTensor

__all__ = ["Cut", "Suffix", "SuffixExtractor", "node_reads", "with_outputs"]


@dataclass(frozen=True)
class Cut:
    """Where a suffix begins: the part of a model that depends on the tensor ``start``, up to ``outputs``.

    ``live``: the other tensors it reads from the rest of the model (its cut set), to be fed from a cache. ``nodes``:
    positions in the graph.
    """

    start: str
    live: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Suffix:
    """A cut with its model; inputs are ``start`` and ``live``."""

    model: onnx.ModelProto
    start: str
    live: tuple[str, ...]
    outputs: tuple[str, ...]


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Copy of ``model`` that also returns the tensors ``names``; types are left to the runtime's inference."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return copy


class SuffixExtractor:
    """Cuts suffixes out of one graph. Serializes the graph once; every suffix copies only what it needs."""

    def __init__(self, graph: Graph, tensors: Mapping[str, RecordedTensor]) -> None:
        """``tensors``: recorded types of the graph's tensors; a suffix declares its inputs with them."""
        self._model = to_proto(graph)
        self._tensors = tensors
        self._reads = [node_reads(node) for node in self._model.graph.node]

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The whole graph."""
        return self._model

    @cached_property
    def _initializers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self._model.graph.initializer}

    @cached_property
    def _data_free(self) -> set[int]:
        """Indices of nodes that depend on no graph input: cheaper to keep than to cache."""
        tainted = {value.name for value in self._model.graph.input} - set(self._initializers)
        free = set()
        for index, node in enumerate(self._model.graph.node):
            if tainted.isdisjoint(self._reads[index]):
                free.add(index)
            else:
                tainted.update(node.output)
        return free

    def prefix(self, outputs: Sequence[str]) -> onnx.ModelProto:
        """What computes ``outputs`` from the graph's inputs."""
        graph = self._model.graph
        needed, kept = set(outputs), []
        for index in reversed(range(len(graph.node))):
            if not needed.isdisjoint(graph.node[index].output):
                kept.append(index)
                needed |= self._reads[index]
        model = self._build(kept[::-1], [], outputs, needed)
        model.graph.input.extend(value for value in graph.input if value.name in needed)
        return model

    def suffix(self, cut: Cut) -> Suffix:
        """The nodes of ``cut`` as a model, with copies of the weights they read."""
        needed = {name for index in cut.nodes for name in self._reads[index]} | set(cut.outputs)
        model = self._build(cut.nodes, [cut.start, *cut.live], cut.outputs, needed)
        return Suffix(model, cut.start, cut.live, cut.outputs)

    def cut(self, start: str, outputs: Sequence[str]) -> Cut:
        """The nodes between ``start`` and those of ``outputs`` that depend on it. An output that is ``start`` itself is
        among the outputs, without a node.
        """
        graph = self._model.graph
        reached, descendants = {start}, set()
        for index, node in enumerate(graph.node):
            if not reached.isdisjoint(self._reads[index]):
                descendants.add(index)
                reached.update(node.output)
        wanted = [name for name in outputs if name in reached]
        needed, kept = set(wanted), set()
        for index in reversed(range(len(graph.node))):
            node = graph.node[index]
            usable = index in descendants or index in self._data_free
            if usable and start not in node.output and not needed.isdisjoint(node.output):
                kept.add(index)
                needed.update(self._reads[index])
        produced = {name for index in kept for name in graph.node[index].output}
        live = sorted(needed - produced - set(self._initializers) - {start, ""})
        return Cut(start, tuple(live), tuple(wanted), tuple(sorted(kept)))

    def _build(
        self, nodes: Sequence[int], inputs: Sequence[str], outputs: Sequence[str], needed: set[str]
    ) -> onnx.ModelProto:
        model = onnx.ModelProto(ir_version=self._model.ir_version)
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.graph.name = "suffix"
        model.graph.node.extend(self._model.graph.node[index] for index in nodes)
        model.graph.initializer.extend(t for name, t in self._initializers.items() if name in needed)
        model.graph.input.extend(self._declared(name) for name in inputs)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return model

    def _declared(self, name: str) -> onnx.ValueInfoProto:
        """Type and rank; extents stay symbolic because samples may differ in shape."""
        recorded = self._tensors[name]
        element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(recorded.dtype))
        return onnx.helper.make_tensor_value_info(name, element, [None] * len(recorded.shape))


def node_reads(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, those captured by its subgraphs included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            # ONNX (IR, "Names within a graph"): inner names are unique, none hides one of an outer scope.
            own = {value.name for value in (*graph.input, *graph.initializer)}
            own.update(name for inner in graph.node for name in inner.output)
            read = {output.name for output in graph.output}
            for inner in graph.node:
                read |= node_reads(inner)
            names |= read - own
    return names
