"""A model with some weights replaced."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = ["with_weights"]


def with_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """Copy of ``model`` whose initializers of these names hold these values."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return copy
