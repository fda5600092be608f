"""A model in pieces that follow each other, so that constants can be changed between one and the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from lcpaq_onnx.graph.rounded import with_weights
from lcpaq_onnx.graph.subgraph import node_reads

__all__ = ["Piece", "Pieces"]

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Piece:
    """``nodes``: positions in the graph. ``inputs``: what they read from before, ``outputs``: what is read of them
    later; ``finished``: what nobody reads once they have run.
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    finished: tuple[str, ...]


class Pieces:
    """Cuts one model. Every node is in one piece at most: that of the first tensor asked for that needs it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._reads = [node_reads(node) for node in model.graph.node]
        self._constants = {tensor.name for tensor in model.graph.initializer}
        self._pending = dict.fromkeys(range(len(model.graph.node)))

    def until(self, tensor: str) -> Piece:
        """What ``tensor`` still needs; no nodes where it has been computed."""
        needed, kept = {tensor}, []
        for index in reversed(self._pending):
            node = self._model.graph.node[index]
            if not needed.isdisjoint(node.output):
                kept.append(index)
                needed |= self._reads[index]
        kept.reverse()
        for index in kept:
            del self._pending[index]
        written = {name for index in kept for name in self._model.graph.node[index].output if name}
        read = {name for index in kept for name in self._reads[index]}
        later = {name for index in self._pending for name in self._reads[index]}
        inputs = read - written - self._constants
        return Piece(
            tuple(kept),
            inputs=tuple(sorted(inputs)),
            outputs=tuple(sorted(written & (later | {tensor}))),
            finished=tuple(sorted((inputs | written) - later - {tensor})),
        )

    def model_of(
        self, piece: Piece, inputs: Mapping[str, Array], weights: Mapping[str, NDArray[np.float32]]
    ) -> onnx.ModelProto:
        """``piece`` as a model. ``inputs``: examples of what it reads, for their types and ranks; ``weights``: by
        initializer, what stands in for it.
        """
        source = self._model
        read = {name for index in piece.nodes for name in self._reads[index]}
        model = onnx.ModelProto(ir_version=source.ir_version)
        model.opset_import.extend(source.opset_import)
        model.functions.extend(source.functions)
        model.graph.name = "piece"
        model.graph.node.extend(source.graph.node[index] for index in piece.nodes)
        model.graph.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in read)
        model.graph.input.extend(
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(inputs[name].dtype), [None] * inputs[name].ndim
            )
            for name in piece.inputs
        )
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.outputs)
        return with_weights(model, weights)
