"""scale-inputs: where range cannot be moved for nothing, one Mul in front of the layers moves it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.graph.channel_flow import channels_last
from lcpaq_onnx.graph.edit import insert_nodes, redirect_readers
from lcpaq_onnx.graph.graph_io import Graph, constant
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.usage import label, returned
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

from .linear_layer import Floats, axes_of_weight, has_weight, rounded
from .migration import factors_of, gain_of, observed
from .scaling_sites import Reader, Site, move
from .scaling_sources import ChannelSource

__all__ = ["ScaleInputs"]


@dataclass(frozen=True)
class ScaleInputs(RewritePass):
    """For a tensor that other nodes read as well, as the residual of a post-norm transformer does. Run
    ``migrate-outliers`` first: what that moved needs no Mul. Where x is quantized for these layers alone, its other
    readers get it unrounded.

    Given:   x → MatMul or Gemm (weight W1), MatMul (weight W2), …; x → anything else
    Result:  x → Mul by 1/s → x/scaled → MatMul (W1·s), MatMul (W2·s), …; x → anything else; the s of least expected
             error (``numeric.channel_noise``)
    Kept when the expected error would not be ``gain`` times less, a weight is computed, shared or overridable, x was
    not finite, or the weights would overflow.

    ``weights``, ``activations``: bits to expect, as for ``migrate-outliers``. ``gain``: what a Mul has to be worth.
    """

    name: ClassVar[str] = "scale-inputs"
    weights: int = 8
    activations: int = 8
    gain: float = 2.0

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if not self.gain > 1:
            raise PassError(f"gain {self.gain:g} of 'scale-inputs' is not above 1", hint="leave it at 2")
        found = list(_sites(graph))
        sites = [site for site in found if isinstance(site, Site)]
        notes = [note for note in found if isinstance(note, Note)]
        ranges = observed(sites, context.analyses)
        modified = False
        for site in sites:
            factors = factors_of(site, ranges, self.weights, self.activations)
            if isinstance(factors, str):
                notes.append(Note(site.name, factors))
                continue
            gain = gain_of(site, ranges, factors, self.weights, self.activations)
            if gain < self.gain:
                notes.append(Note(site.name, f"scaling it would gain only {gain:.2g} times"))
                continue
            reason = move(site, factors)
            notes += [Note(site.name, reason)] if reason else []
            modified |= not reason
        return PassResult(modified, tuple(notes))


@dataclass(frozen=True, eq=False)
class _BeforeLayers(ChannelSource):
    """``tensor`` as ``nodes``, in graph order, read it."""

    graph: Graph
    nodes: tuple[gs.Node, ...]
    dtype: np.dtype[np.generic]

    def divide(self, factors: Floats) -> str:
        inverse = rounded(1 / factors, self.dtype)
        if not np.isfinite(inverse.astype(np.float64)).all():
            return f"the factors of '{self.tensor.name}' would overflow"
        scaled = gs.Variable(f"{self.tensor.name}/scaled")
        operands = [self.tensor, constant(f"{self.tensor.name}/factors", inverse)]
        redirect_readers(self.nodes, self.tensor, scaled)
        product = gs.Node("Mul", f"{self.tensor.name}/Mul", inputs=operands, outputs=[scaled])
        insert_nodes(self.graph, before={id(self.nodes[0]): [product]})
        return ""


def _sites(graph: Graph) -> Iterator[Site | Note]:
    """Tensors that matrix products read, in graph order, with all of these that can take factors."""
    kept = returned(graph)
    readers: dict[int, list[Reader]] = {}
    for node in graph.nodes:
        if not has_weight(node) or isinstance(node.inputs[0], gs.Constant):
            continue
        weight = node.inputs[facts_of(node.op, node.domain).weight_input or 0]
        axes = axes_of_weight(graph, node, weight, kept)
        if isinstance(axes, str):
            yield Note(label(node), axes)
        elif len(axes.shape) == 2 and not node.attrs.get("transA", 0):
            assert isinstance(weight, gs.Constant)
            reader = Reader(node, weight, axes, np.arange(axes.inputs), -1)
            readers.setdefault(id(node.inputs[0]), []).append(reader)
    for group in readers.values():
        first = group[0]
        layout = channels_last(first.axes.inputs, None)
        nodes = tuple(reader.node for reader in group)
        source = _BeforeLayers(first.node.inputs[0], layout, graph, nodes, np.dtype(first.weight.dtype))
        yield Site(source, tuple(group))
