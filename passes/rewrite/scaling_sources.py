"""What can write a tensor with each channel divided by a number of its own: layers, and scales and shifts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.channel_flow import Layout, channels_first, channels_last
from lcpaq_onnx.graph.graph_io import Graph, constant
from lcpaq_onnx.graph.model import DEFAULT_DOMAINS
from lcpaq_onnx.graph.usage import why_not_fixed

from .linear_layer import FLOAT_TYPES, Affine, Floats, LinearLayer, has_weight, layer_behind, rounded

__all__ = ["ChannelSource", "LayerSource", "VectorSource", "layer_source", "vector_source"]


@dataclass(frozen=True, eq=False)
class ChannelSource(ABC):
    """Writes ``tensor``, laid out as ``layout`` says."""

    tensor: gs.Tensor
    layout: Layout

    @property
    def channels(self) -> int:
        """Of the tensor."""
        return self.layout.channels

    @abstractmethod
    def divide(self, factors: Floats) -> str:
        """Divide what it writes by ``factors``, positive [channels]; or the reason why not, and no change."""


@dataclass(frozen=True, eq=False)
class LayerSource(ChannelSource):
    """A layer, with its bias."""

    layer: LinearLayer

    def divide(self, factors: Floats) -> str:
        return self.layer.absorb(Affine(1 / factors, np.zeros_like(factors)), f"{self.tensor.name}/bias")


@dataclass(frozen=True, eq=False)
class VectorSource(ChannelSource):
    """Constants of one number per channel, all of which scale with the output. ``slots``: who reads them, and where."""

    slots: tuple[tuple[gs.Node, int], ...]
    returned: frozenset[int]

    def divide(self, factors: Floats) -> str:
        divided = [_divided(node.inputs[index], factors) for node, index in self.slots]
        if not all(np.isfinite(values.astype(np.float64)).all() for values in divided):
            return f"the scale of '{self.tensor.name}' would overflow"
        for (node, index), values in zip(self.slots, divided, strict=True):
            present = node.inputs[index]
            if isinstance(present, gs.Constant) and len(present.outputs) == 1 and id(present) not in self.returned:
                present.values = values
            else:  # a vector is small: the other readers keep theirs
                node.inputs[index] = constant(f"{node.outputs[0].name}/{index}", values)
        return ""


def layer_source(graph: Graph, node: gs.Node, returned: frozenset[int]) -> LayerSource | str | None:
    """The layer that ``node`` ends, None if it ends none, or why it must stay as it is."""
    layer = layer_behind(graph, node, returned)
    if isinstance(layer, str):
        return layer if has_weight(node) else None
    if layer is None:
        return None
    bias = layer.bias()
    if isinstance(bias, str):
        return bias
    tensor = node.outputs[0]
    if layer.bias_is_free and len(tensor.outputs) == 1 and id(tensor) not in returned:
        after = layer_behind(graph, tensor.outputs[0], returned)
        if isinstance(after, LinearLayer) and after.node is layer.node:
            return None  # the Add behind it is a part of it
    if layer.trailing:
        layout = channels_first(layer.channels, layer.trailing + 2)
    else:
        layout = channels_last(layer.channels, layer.rank)
    return LayerSource(tensor, layout, layer)


_NORMS_ALONG_LAST = ("LayerNormalization", "RMSNormalization")
_NORMS = {
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
}
"""Operators that end in a scale, and a shift, per channel: which inputs these are."""


def vector_source(graph: Graph, node: gs.Node, returned: frozenset[int]) -> VectorSource | str | None:
    """The normalization, or Mul by one number for each place on the last axis, with or without an Add behind it, that
    ``node`` ends; None if it ends none, or why it must stay as it is.
    """
    if (node.domain or "") not in DEFAULT_DOMAINS:
        return None
    slots = _norm_slots(node) if node.op in _NORMS else _product_slots(node, returned)
    if slots is None:
        return None
    channels = max(_last_extent(owner.inputs[index]) for owner, index in slots)
    if channels < 2:
        return None
    for owner, index in slots:
        reason = _why_no_vector(graph, owner.inputs[index], channels)
        if reason:
            return reason
    layout = _norm_layout(node, channels) if node.op in _NORMS else channels_last(channels, None)
    return layout if isinstance(layout, str) else VectorSource(node.outputs[0], layout, slots, returned)


def _norm_slots(node: gs.Node) -> tuple[tuple[gs.Node, int], ...]:
    present = (index for index in _NORMS[node.op] if index < len(node.inputs) and not node.inputs[index].is_empty())
    return tuple((node, index) for index in present)


def _norm_layout(node: gs.Node, channels: int) -> Layout | str:
    if any(not output.is_empty() for output in node.outputs[1:]) or node.attrs.get("training_mode", 0):
        return "it returns statistics too"
    if node.op in _NORMS_ALONG_LAST:
        is_last = int(node.attrs.get("axis", -1)) == -1 and len(node.inputs[1].shape) == 1
        return channels_last(channels, None) if is_last else "it normalizes more than the last axis"
    shape = node.outputs[0].shape
    if shape is None or not node.attrs.get("spatial", 1):
        return "the rank of its output is not known"
    return channels_first(channels, len(shape))


def _product_slots(node: gs.Node, returned: frozenset[int]) -> tuple[tuple[gs.Node, int], ...] | None:
    """Mul by a vector that no such Add reads; or Add of a vector to such a Mul that nothing else reads."""
    operand = _vector_operand(node)
    if operand is None:
        return None
    if node.op == "Mul":
        tensor = node.outputs[0]
        end = tensor.outputs[0] if len(tensor.outputs) == 1 and id(tensor) not in returned else None
        is_shifted = end is not None and end.op == "Add" and _vector_operand(end) is not None
        return None if is_shifted else ((node, operand),)
    data = node.inputs[1 - operand]
    if len(data.outputs) != 1 or len(data.inputs) != 1 or id(data) in returned or data.inputs[0].op != "Mul":
        return None
    factor = _vector_operand(data.inputs[0])
    return None if factor is None else ((data.inputs[0], factor), (node, operand))


def _vector_operand(node: gs.Node) -> int | None:
    """Which input of a Mul or Add is a constant along the last axis, or a scalar; None unless the other is computed."""
    if node.op not in ("Add", "Mul") or len(node.inputs) != 2:
        return None
    are_constant = [isinstance(tensor, gs.Constant) for tensor in node.inputs]
    if sum(are_constant) != 1:
        return None
    index = are_constant.index(True)
    return index if all(extent == 1 for extent in node.inputs[index].shape[:-1]) else None


def _last_extent(tensor: gs.Tensor) -> int:
    return int(tensor.shape[-1]) if isinstance(tensor, gs.Constant) and len(tensor.shape) else 1


def _why_no_vector(graph: Graph, tensor: gs.Tensor, channels: int) -> str:
    unfixed = why_not_fixed(graph, tensor)
    if unfixed:
        return unfixed
    if np.dtype(tensor.dtype) not in FLOAT_TYPES:
        return f"'{tensor.name}' is {tensor.dtype}"
    return "" if _last_extent(tensor) in (1, channels) else f"'{tensor.name}' is not one number per channel"


def _divided(tensor: gs.Tensor, factors: Floats) -> NDArray[Any]:
    assert isinstance(tensor, gs.Constant)
    with np.errstate(over="ignore"):
        return rounded(tensor.values.astype(np.float64) / factors, tensor.dtype)
