"""Linear layers as ``channel -> weights and bias``, so that an affine function behind one can move into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph, constant
from lcpaq_onnx.graph.model import DEFAULT_DOMAINS
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.usage import label, why_not_fixed
from lcpaq_onnx.graph.weight_axes import WeightAxes, weight_axes

__all__ = [
    "FLOAT_TYPES",
    "Affine",
    "Floats",
    "LinearLayer",
    "axes_of_weight",
    "has_weight",
    "layer_behind",
    "per_channel",
    "rounded",
]

Floats = NDArray[np.float64]

FLOAT_TYPES = frozenset(np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16))
"""Element types that weights may be rounded to."""


@dataclass(frozen=True, eq=False)
class Affine:
    """``y = scale · x + shift``, float64 [channels] each."""

    scale: Floats
    shift: Floats


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A node with a weight, and for MatMul the Add behind it, if there is one.

    ``trailing``: axes behind the channel axis; ``rank`` of the output, None if unknown.
    ``returned``: ``id`` of every tensor of ``graph`` that is returned.
    """

    graph: Graph
    returned: frozenset[int]
    node: gs.Node
    bias_add: gs.Node | None
    weight: gs.Constant
    axes: WeightAxes
    trailing: int
    rank: int | None

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.axes.outputs

    def absorb(self, affine: Affine, bias_name: str) -> str:
        """Move ``affine`` into weight and bias, rounded once, from float64; or the reason why not, and no change.

        The weight must have no other reader. A bias that did not exist, or has other readers, becomes ``bias_name``.
        """
        if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
            return "its scale or shift is not finite"
        dtype = self.weight.dtype
        bias = self.bias()
        if isinstance(bias, str):
            return bias
        if self.bias_is_free and np.any(affine.shift):
            return f"{self.node.op} has no bias that a shift could go into"
        weight = rounded(self.weight.values.astype(np.float64) * self.axes.along_outputs(affine.scale), dtype)
        shifted = rounded(affine.shift + affine.scale * (0.0 if bias is None else bias), dtype)
        if not (np.isfinite(weight.astype(np.float64)).all() and np.isfinite(shifted.astype(np.float64)).all()):
            return f"the folded weights do not fit {dtype}"
        self.weight.values = weight
        if bias is not None or np.any(affine.shift):
            self._set_bias(shifted, bias_name)
        return ""

    @property
    def bias_is_free(self) -> bool:
        """Whether the layer adds no bias and has no input for one: an Add behind it is where its bias goes."""
        return self._needs_add and self.bias_add is None

    @property
    def _needs_add(self) -> bool:
        return facts_of(self.node.op, self.node.domain).bias_input is None

    def _bias_slot(self) -> tuple[gs.Node, int]:
        """The node that adds the bias, and which input it is."""
        if self.bias_add is not None:
            return self.bias_add, _constant_operand(self.bias_add)
        index = facts_of(self.node.op, self.node.domain).bias_input
        assert index is not None
        return self.node, index

    def bias(self) -> Floats | str | None:
        """Present bias [channels], None if there is none, or why it is not one fixed number per channel."""
        if self.bias_is_free:
            return None
        node, index = self._bias_slot()
        if len(node.inputs) <= index or node.inputs[index].is_empty():
            return None
        tensor = node.inputs[index]
        unfixed = why_not_fixed(self.graph, tensor)
        if unfixed:
            return f"the bias {unfixed}"
        assert isinstance(tensor, gs.Constant)
        # A convolution's bias is [channels], whatever axes trail in its output.
        values = tensor.values.astype(np.float64) if self.trailing else per_channel(tensor, self)
        if values is None:
            return f"the bias '{tensor.name}' of shape {list(tensor.shape)} is not one number per channel"
        return values * float(self.node.attrs.get("beta", 1.0))

    def _set_bias(self, values: NDArray[Any], name: str) -> None:
        node, index = self._bias_slot()
        node.attrs.pop("beta", None)
        if len(node.inputs) > index and not node.inputs[index].is_empty():
            present = node.inputs[index]
            if isinstance(present, gs.Constant) and len(present.outputs) == 1 and id(present) not in self.returned:
                present.values = values
                return
            node.inputs[index] = constant(name, values)
            return
        while len(node.inputs) <= index:
            node.inputs.append(gs.Variable.empty())
        node.inputs[index] = constant(name, values)


def layer_behind(graph: Graph, writer: gs.Node, returned: frozenset[int]) -> LinearLayer | str | None:
    """The layer that ``writer`` ends, None if it is no layer, or why its weight must stay as it is."""
    bias_add = None
    node = writer
    if writer.op == "Add" and (writer.domain or "") in DEFAULT_DOMAINS:
        matmul = _biased_matmul(writer, returned)
        if matmul is None:
            return None
        node, bias_add = matmul, writer
    facts = facts_of(node.op, node.domain)
    if facts.weight_input is None or len(node.inputs) <= facts.weight_input:
        return None
    weight = node.inputs[facts.weight_input]
    axes = axes_of_weight(graph, node, weight, returned)
    if isinstance(axes, str):
        return axes
    assert isinstance(weight, gs.Constant)
    shape = axes.shape
    # Only the rank of a MatMul depends on its input.
    output_shape = shape if facts.bias_input is not None else node.outputs[0].shape
    rank = None if output_shape is None else len(output_shape)
    return LinearLayer(graph, returned, node, bias_add, weight, axes, len(shape) - 2, rank)


def has_weight(node: gs.Node) -> bool:
    """Whether ``node`` is a layer: its weight is a constant."""
    index = facts_of(node.op, node.domain).weight_input
    return index is not None and len(node.inputs) > index and isinstance(node.inputs[index], gs.Constant)


def axes_of_weight(graph: Graph, node: gs.Node, weight: gs.Tensor, returned: frozenset[int]) -> WeightAxes | str:
    """Channels in the weight of the layer ``node``, or why the weight must stay as it is."""
    reason = why_not_fixed(graph, weight)
    if reason:
        return f"the weight {reason}"
    if len(weight.outputs) != 1 or id(weight) in returned:
        others = sorted({label(reader) for reader in weight.outputs} - {label(node)})
        return f"the weight '{weight.name}' is shared with {', '.join(others) or 'another input'}"
    if np.dtype(weight.dtype) not in FLOAT_TYPES:
        return f"the weight '{weight.name}' is {weight.dtype}"
    axes = weight_axes(node, tuple(int(extent) for extent in weight.shape))
    return axes or f"the weight '{weight.name}' of shape {list(weight.shape)} has no axis of output channels"


def per_channel(tensor: gs.Constant, layer: LinearLayer) -> Floats | None:
    """Values [channels] of an operand that broadcasts against the layer's output along channels only, else None.

    Where the rank of the output is unknown, only scalars and vectors can be told not to raise it.
    """
    shape = tuple(int(extent) for extent in tensor.shape)
    others = list(reversed(shape))
    along = others.pop(layer.trailing) if len(others) > layer.trailing else 1
    most_axes = 1 if layer.rank is None else layer.rank
    if len(shape) > most_axes or along not in (1, layer.channels) or any(extent != 1 for extent in others):
        return None
    return np.broadcast_to(tensor.values.astype(np.float64).reshape(-1), layer.channels)


def _constant_operand(node: gs.Node) -> int:
    return next(index for index, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant))


def _biased_matmul(add: gs.Node, returned: frozenset[int]) -> gs.Node | None:
    """The layer without a bias of its own whose output, used nowhere else, ``add`` adds a constant to."""
    if sum(isinstance(tensor, gs.Constant) for tensor in add.inputs) != 1:
        return None
    data = add.inputs[1 - _constant_operand(add)]
    if len(data.inputs) != 1 or len(data.outputs) != 1 or id(data) in returned:
        return None
    (node,) = data.inputs
    facts = facts_of(node.op, node.domain)
    return node if facts.weight_input is not None and facts.bias_input is None else None


def rounded(values: Floats, dtype: np.dtype[Any]) -> NDArray[Any]:
    """``values`` in ``dtype``; infinite where they do not fit."""
    with np.errstate(over="ignore"):  # float16 overflow is looked for afterwards
        return values.astype(dtype)
