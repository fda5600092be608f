"""How channels travel: whether a positive factor per channel in front of an operator comes out behind it, and where.

Nothing here needs shapes to be known: ranks follow from weights, kernels and permutations, and where they do not, the
factor goes no further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.model import DEFAULT_DOMAINS

__all__ = [
    "Digit",
    "Layout",
    "Passage",
    "channels_along",
    "channels_first",
    "channels_last",
    "ignores_values",
    "layout_behind",
]


@dataclass(frozen=True)
class Digit:
    """One axis that tells channels apart, counted from the end (-1 is the last): the channel grows by ``stride`` with
    each of its ``extent`` steps.
    """

    axis: int
    extent: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """Which of ``channels`` an element of a tensor belongs to.

    ``digits``: axes that the channel is the sum of, the widest first; () where no axes are known.
    ``period``: the channel is the element's flat index modulo ``channels``, so that a Reshape keeps it.
    ``blocks``: a matrix of rows that hold equally many elements of each channel in turn.
    ``rank`` of the tensor, None if unknown.
    """

    channels: int
    digits: tuple[Digit, ...] = ()
    period: bool = False
    blocks: bool = False
    rank: int | None = None


def channels_first(channels: int, rank: int) -> Layout:
    """Channels along axis 1, as convolutions have them."""
    return _settled(Layout(channels, (Digit(1 - rank, channels, 1),), rank=rank))


def channels_last(channels: int, rank: int | None) -> Layout:
    """Channels along the last axis, as matrix products have them."""
    return _settled(Layout(channels, (Digit(-1, channels, 1),), rank=rank))


def channels_along(layout: Layout, axis: int, extent: int) -> np.ndarray | None:
    """The channel [extent] of each position along ``axis``, counted from the end; None where it is not decided by that
    alone.
    """
    if layout.digits == (Digit(axis, layout.channels, 1),) and extent == layout.channels:
        return np.arange(extent)
    if axis != -1 or extent % layout.channels:
        return None
    if layout.period:
        return np.arange(extent) % layout.channels
    return np.arange(extent) // (extent // layout.channels) if layout.blocks else None


@dataclass(frozen=True)
class Passage:
    """Through ``node`` from its input ``position`` to its first output. ``shape`` of that output as it was when the
    model ran; None if nobody ran it.
    """

    node: gs.Node
    position: int = 0
    shape: tuple[int, ...] | None = None


def layout_behind(passage: Passage, layout: Layout) -> Layout | None:
    """Layout of the output, given that of the input, when a positive factor per channel of that input, and of no other,
    is a factor of the output too. None where it is not, or this is not known.
    """
    node = passage.node
    rule = _RULES.get(node.op) if (node.domain or "") in DEFAULT_DOMAINS else None
    return rule(passage, layout) if rule else None


def ignores_values(node: gs.Node) -> bool:
    """Whether ``node`` reads no more than the shape of its inputs."""
    return node.op in ("Shape", "Size") and (node.domain or "") in DEFAULT_DOMAINS


Rule = Callable[[Passage, Layout], "Layout | None"]


def _settled(layout: Layout) -> Layout:
    """``layout`` with ``period`` found out from its digits."""
    stride, axis = 1, -1
    for digit in reversed(layout.digits):
        if (digit.axis, digit.stride) != (axis, stride):
            return replace(layout, period=False)
        stride, axis = stride * digit.extent, axis - 1
    return replace(layout, period=stride == layout.channels and bool(layout.digits))


def _same(passage: Passage, layout: Layout) -> Layout | None:
    return layout if passage.position == 0 else None


def _clip(passage: Passage, layout: Layout) -> Layout | None:
    """Only one that is a Relu: from zero, without an end."""
    bounds = [passage.node.attrs.get("min"), passage.node.attrs.get("max")]
    for index, tensor in enumerate(passage.node.inputs[1:3]):
        if not tensor.is_empty():
            bounds[index] = tensor.values.item() if isinstance(tensor, gs.Constant) else np.nan
    low, high = bounds
    is_open = high is None or high >= np.finfo(np.float32).max
    return layout if passage.position == 0 and low == 0 and is_open else None


def _pool(passage: Passage, layout: Layout) -> Layout | None:
    rank = len(passage.node.attrs["kernel_shape"]) + 2
    return channels_first(layout.channels, rank) if layout.digits == _first(layout, rank) else None


def _global_pool(passage: Passage, layout: Layout) -> Layout | None:
    """What lies behind the channel axis has one element each, so the channel is also the flat index."""
    if layout.rank is None or layout.digits != _first(layout, layout.rank):
        return None
    return replace(layout, period=True)


def _first(layout: Layout, rank: int) -> tuple[Digit, ...]:
    return (Digit(1 - rank, layout.channels, 1),)


def _pad(passage: Passage, layout: Layout) -> Layout | None:
    """Padding of other axes, by zeros or by what is there."""
    node = passage.node
    pads = node.attrs.get("pads")
    if pads is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        pads = node.inputs[1].values.tolist()
    has_axes = len(node.inputs) > 3 and not node.inputs[3].is_empty()
    if passage.position != 0 or pads is None or has_axes or not layout.digits or not _fills_zero(node):
        return None
    rank = len(pads) // 2
    touched = any(pads[digit.axis + rank] or pads[digit.axis] for digit in layout.digits)
    return None if touched else _settled(replace(layout, blocks=False, rank=rank))


def _fills_zero(node: gs.Node) -> bool:
    if node.attrs.get("mode", "constant") != "constant":
        return True
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        fill = node.inputs[2]
        return isinstance(fill, gs.Constant) and not np.any(fill.values)
    return not node.attrs.get("value", 0.0)


def _flatten(passage: Passage, layout: Layout) -> Layout | None:
    if layout.period:
        return Layout(layout.channels, period=True, rank=2)
    if passage.node.attrs.get("axis", 1) != 1 or layout.rank is None or layout.digits != _first(layout, layout.rank):
        return None
    return Layout(layout.channels, blocks=True, rank=2)


def _reshape(passage: Passage, layout: Layout) -> Layout | None:
    if passage.position != 0 or not layout.period:
        return None
    rank, ends = _new_shape(passage)
    reshaped = Layout(layout.channels, period=True, rank=rank)
    for count in (1, 2):
        extents = ends[len(ends) - count :]
        if len(extents) == count and min(extents) > 0 and np.prod(extents) == layout.channels:
            strides = [int(np.prod(extents[place + 1 :])) for place in range(count)]
            digits = (Digit(place - count, extents[place], strides[place]) for place in range(count))
            return replace(reshaped, digits=tuple(digits))
    return reshaped


def _new_shape(passage: Passage) -> tuple[int | None, list[int]]:
    """Rank of a Reshape's result and what is known of its last extents: all of a constant shape, or the constants that
    a Concat of numbers ends in. One that is left to be worked out (-1) is as it was when the model ran.
    """
    shape = passage.node.inputs[1] if len(passage.node.inputs) > 1 else None
    if isinstance(shape, gs.Constant):
        rank, ends = int(shape.shape[0]), shape.values.tolist()
    elif shape is not None and len(shape.inputs) == 1 and shape.inputs[0].op == "Concat":
        parts = [
            part.values.ravel().tolist() if isinstance(part, gs.Constant) else None for part in shape.inputs[0].inputs
        ]
        first = max((index + 1 for index, part in enumerate(parts) if part is None), default=0)
        rank, ends = None, [extent for part in parts[first:] for extent in part or ()]
    else:
        return None, []
    seen = passage.shape[len(passage.shape) - len(ends) :] if passage.shape and ends else ends
    return rank, [now if extent == -1 else extent for extent, now in zip(ends, seen, strict=True)]


def _regroup(passage: Passage, layout: Layout) -> Layout | None:
    """Squeeze and Unsqueeze: axes of one element come and go."""
    return Layout(layout.channels, period=True) if passage.position == 0 and layout.period else None


def _transpose(passage: Passage, layout: Layout) -> Layout | None:
    order = passage.node.attrs.get("perm")
    if order is None or not layout.digits:
        return None
    rank = len(order)
    moved = [replace(digit, axis=order.index(digit.axis + rank) - rank) for digit in layout.digits]
    return _settled(replace(layout, digits=tuple(moved), blocks=False, rank=rank))


def _product(passage: Passage, layout: Layout) -> Layout | None:
    """Times anything else; broadcasting aligns axes at their ends, so axes that tell channels apart stay."""
    other = passage.node.inputs[1 - passage.position]
    if not layout.digits or any(digit.extent == 1 for digit in layout.digits):
        return None
    is_lower = isinstance(other, gs.Constant) and layout.rank is not None and len(other.shape) <= layout.rank
    return _settled(replace(layout, blocks=False, rank=layout.rank if is_lower else None))


def _quotient(passage: Passage, layout: Layout) -> Layout | None:
    return _product(passage, layout) if passage.position == 0 else None


def _weighted_sum(passage: Passage, layout: Layout) -> Layout | None:
    """Rows of the second factor mixed by another tensor, as attention does with its values."""
    summed = -2
    if passage.position != 1 or not layout.digits or any(digit.axis == summed for digit in layout.digits):
        return None
    # A vector would itself be summed over.
    if (layout.rank is None and len(layout.digits) == 1) or any(digit.extent == 1 for digit in layout.digits):
        return None
    return _settled(replace(layout, blocks=False, rank=None))


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(["Identity", "LeakyRelu", "PRelu", "Relu"], _same),
    **dict.fromkeys(["AveragePool", "MaxPool"], _pool),
    **dict.fromkeys(["GlobalAveragePool", "GlobalMaxPool"], _global_pool),
    **dict.fromkeys(["Squeeze", "Unsqueeze"], _regroup),
    "Clip": _clip,
    "Div": _quotient,
    "Flatten": _flatten,
    "MatMul": _weighted_sum,
    "Mul": _product,
    "Pad": _pad,
    "Reshape": _reshape,
    "Transpose": _transpose,
}
