"""Writing a layer's integers: what the rounding passes have in common."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.edit import constant_to_variable
from lcpaq_onnx.graph.emit import ROUND_PASS, dequantize_weight, scale_weight
from lcpaq_onnx.numeric.rounding import QuantizedWeight, mse_scales, round_nearest
from lcpaq_onnx.planning.plan import LayerPlan

from .planned import bias_of

__all__ = ["least_scale", "nearest", "write_weight"]

# Half of int32: leaves room for the products that the bias is added to.
_BIAS_LIMIT = float(1 << 30)


def least_scale(layer: LayerPlan, node: gs.Node, input_scales: dict[str, np.float32]) -> NDArray[np.float32]:
    """Smallest weight scale at which the bias still fits its int32; ``input_scales`` by layer."""
    bias = bias_of(node, layer)
    if layer.bias_format != "int32" or bias is None:
        return np.zeros((), np.float32)
    largest = np.abs(np.asarray(bias.values, np.float32))
    needed = np.asarray(largest / (input_scales[layer.name] * np.float32(_BIAS_LIMIT)), np.float32)
    return needed if layer.qformat.axis is not None else np.asarray(needed.max())


def nearest(layer: LayerPlan, values: NDArray[np.float32], least: NDArray[np.float32]) -> QuantizedWeight:
    """Nearest integers at the scale of least squared error, which is at least ``least``."""
    scale = np.maximum(mse_scales(values, layer.qformat), least).astype(np.float32)
    return round_nearest(values, layer.qformat, scale)


def write_weight(weight: gs.Constant, layer: LayerPlan, rounded: QuantizedWeight) -> list[gs.Node]:
    """The nodes that restore ``weight`` from ``rounded``, to stand before ``layer``; ``weight`` becomes their result.
    All rounding passes mark them alike: their files differ in the integers alone.
    """
    result = constant_to_variable(weight)
    if layer.layer_format.is_folded:
        return scale_weight(rounded, result, ROUND_PASS)
    return [dequantize_weight(rounded, result, ROUND_PASS)]
