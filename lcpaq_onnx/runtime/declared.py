"""A model's inputs as its file declares them: what ``Session.inputs`` would say, without loading the model."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.runtime.session import TensorSpec

__all__ = ["declared_inputs"]


def declared_inputs(graph: Graph) -> tuple[TensorSpec, ...]:
    """Inputs that every run needs; ``type_name`` stays empty for tensors. Whether ONNX Runtime can run the model is not
    known yet.
    """
    return tuple(_spec(tensor) for tensor in graph.inputs)


def _spec(tensor: gs.Tensor) -> TensorSpec:
    if not isinstance(tensor, gs.Variable) or tensor.type != "tensor_type" or tensor.dtype is None:
        return TensorSpec(tensor.name, np.dtype(object), (), "sequence, map or optional")
    # Texts are objects in graphs and texts in sessions.
    dtype = np.dtype(np.str_) if np.dtype(tensor.dtype) == np.dtype(object) else np.dtype(tensor.dtype)
    return TensorSpec(tensor.name, dtype, tuple(_dimension(dim) for dim in tensor.shape or ()))


def _dimension(declared: int | str | None) -> int | str | None:
    """ONNX Runtime takes negative sizes and empty names for unknown."""
    if isinstance(declared, int):
        return declared if declared >= 0 else None
    return declared or None
