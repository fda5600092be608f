"""Is a graph in memory a valid ONNX model, and is it still the same one."""

from __future__ import annotations

import hashlib

import onnx
import onnx.checker
import onnx.shape_inference

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.graph.graph_io import Graph, to_proto

__all__ = ["check_graph", "graph_digest"]


def graph_digest(graph: Graph) -> str:
    """sha256 of what would be written, external data by reference only."""
    return hashlib.sha256(to_proto(graph).SerializeToString(deterministic=True)).hexdigest()


def check_graph(graph: Graph, *, payload_bytes: int | None = None) -> None:
    """onnx.checker's full check: node signatures, topological order, unique names, inferable types.

    Payloads in other files are not looked at, nor those above ``payload_bytes``. Raises ModelError with the checker's
    reason.
    """
    model = to_proto(graph)
    _unseen_as_inputs(model.graph, payload_bytes)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"the model is not valid ONNX: {' '.join(str(error).split())}",
            hint="check the model file with onnx.checker",
        ) from error


def _unseen_as_inputs(graph: onnx.GraphProto, payload_bytes: int | None) -> None:
    """An input of that type checks the same; the checker looks for external data relative to the current directory."""
    unseen = [
        tensor
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        or (payload_bytes is not None and tensor.ByteSize() > payload_bytes)
    ]
    inputs = {value.name for value in graph.input}
    for tensor in unseen:
        graph.initializer.remove(tensor)
        if tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
