"""Places where a factor per channel can move from a tensor into the weights of all layers that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.channel_flow import Layout, Passage, channels_along, ignores_values, layout_behind
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.usage import label, returned
from lcpaq_onnx.graph.weight_axes import WeightAxes
from lcpaq_onnx.manager.pass_base import Note

from .linear_layer import Floats, axes_of_weight, has_weight, rounded
from .scaling_sources import ChannelSource

__all__ = ["Reader", "Site", "find_sites", "is_live", "is_worth_it", "move"]

_LEAST_CHANGE = 0.01
"""Factors this near to one change no range by more than the rounding of a scale; ends the search for better ones."""

_DEAD = 1e-6
"""Weights smaller than this share of a tensor's are what training left of unused channels; to make them as large as the
others would take huge factors for nothing.
"""


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer behind a source. ``channel_of`` [inputs of the layer]: the source's channel that each one holds; they
    lie along ``axis`` of what it reads, counted from the end.
    """

    node: gs.Node
    weight: gs.Constant
    axes: WeightAxes
    channel_of: NDArray[np.intp]
    axis: int

    def multiplied(self, factors: Floats) -> NDArray[np.generic]:
        """The weight with ``factors`` [source's channels] moved in, rounded once, from float64."""
        spread = self.axes.along_inputs(factors[self.channel_of])
        return rounded(self.weight.values.astype(np.float64) * spread, self.weight.dtype)


@dataclass(frozen=True, eq=False)
class Site:
    """A source and all layers that read it, whatever passes factors on between them."""

    source: ChannelSource
    readers: tuple[Reader, ...]

    @property
    def name(self) -> str:
        """The tensor that the source writes."""
        return str(self.source.tensor.name)


def find_sites(
    graph: Graph,
    source_behind: Callable[[gs.Node, frozenset[int]], ChannelSource | str | None],
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[list[Site], list[Note]]:
    """Sites in graph order, and why other sources are none.

    ``source_behind``: the source that a node ends, None if it ends none, or why it must stay; it is told the ``id`` of
    every tensor that is returned. ``shapes`` of tensors when the model ran, for heads whose number the runtime works
    out; without them such sites are not found.
    """
    walk = _Walk(graph, returned(graph), frozenset(id(node) for node in graph.nodes), shapes)
    sites, notes = [], []
    for node in graph.nodes:
        source = source_behind(node, walk.returned)
        if source is None:
            continue
        found = [source] if isinstance(source, str) else list(walk.readers(source.tensor, source.layout))
        reasons = [entry for entry in found if isinstance(entry, str)]
        if reasons or not found or isinstance(source, str):
            notes.append(Note(label(node), reasons[0] if reasons else "nothing reads what it writes"))
            continue
        sites.append(Site(source, tuple(entry for entry in found if isinstance(entry, Reader))))
    return sites, notes


def is_live(magnitudes: Floats, share: float = _DEAD) -> NDArray[np.bool_]:
    """Which of ``magnitudes`` [channels] are above ``share`` of the largest."""
    live: NDArray[np.bool_] = magnitudes > share * magnitudes.max(initial=0.0)
    return live


def is_worth_it(factors: Floats) -> bool:
    """Whether ``factors`` differ from one by more than repeating the work would show."""
    return bool(np.abs(factors - 1).max() > _LEAST_CHANGE)


def move(site: Site, factors: Floats) -> str:
    """Divide the source's channels by ``factors``, positive [channels], and multiply the readers' weights by them.

    Empty once done; else the reason why not, and nothing is changed.
    """
    with np.errstate(over="ignore"):
        weights = [reader.multiplied(factors) for reader in site.readers]
    if not all(np.isfinite(weight.astype(np.float64)).all() for weight in weights):
        return f"the weights that read '{site.name}' would overflow"
    reason = site.source.divide(factors)
    if reason:
        return reason
    for reader, weight in zip(site.readers, weights, strict=True):
        reader.weight.values = weight
    return ""


@dataclass(frozen=True, eq=False)
class _Walk:
    """From a source to all that its factors would reach. ``returned``, ``top_level``: ``id`` of tensors and nodes."""

    graph: Graph
    returned: frozenset[int]
    top_level: frozenset[int]
    shapes: Mapping[str, tuple[int, ...]]

    def readers(self, tensor: gs.Tensor, layout: Layout) -> Iterator[Reader | str]:
        """Layers that ``tensor`` reaches, and why a factor in it would be seen elsewhere."""
        pending = [(tensor, layout)]
        passed: set[int] = set()
        while pending:
            tensor, layout = pending.pop(0)
            if id(tensor) in self.returned:
                yield f"'{tensor.name}' is returned"
            for node in tensor.outputs:
                if ignores_values(node):
                    continue
                behind = self._behind(node, tensor, layout)
                if id(node) in passed:
                    behind = f"{label(node)} reads what comes from it twice"
                passed.add(id(node))
                if isinstance(behind, Layout):
                    pending.append((node.outputs[0], behind))
                else:
                    yield behind

    def _behind(self, node: gs.Node, tensor: gs.Tensor, layout: Layout) -> Layout | Reader | str:
        """What becomes of the factors in ``node``."""
        positions = [index for index, value in enumerate(node.inputs) if value is tensor]
        if id(node) not in self.top_level or len(positions) != 1:
            return f"{label(node)} reads '{tensor.name}' in a way that is not looked into"
        (position,) = positions
        if position == 0 and has_weight(node):
            return self._reader(node, layout)
        behind = layout_behind(Passage(node, position, self.shapes.get(node.outputs[0].name)), layout)
        return behind or f"{node.op} {label(node)} does not pass a factor per channel on"

    def _reader(self, node: gs.Node, layout: Layout) -> Reader | str:
        index = facts_of(node.op, node.domain).weight_input
        assert index is not None
        weight = node.inputs[index]
        axes = axes_of_weight(self.graph, node, weight, self.returned)
        if isinstance(axes, str):
            return axes
        assert isinstance(weight, gs.Constant)
        axis = 1 - len(axes.shape)  # -1 for matrices
        channel_of = None if node.attrs.get("transA", 0) else channels_along(layout, axis, axes.inputs)
        if channel_of is None:
            return f"{label(node)} does not sum over the channels alone"
        return Reader(node, weight, axes, channel_of, axis)
