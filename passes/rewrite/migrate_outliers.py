"""migrate-outliers: channels of wide range become narrower, and the layers that read them multiply by more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

from ..analysis.recorded_tensors import RecordedTensors
from .migration import factors_of, observed
from .scaling_sites import Site, find_sites, is_worth_it, move
from .scaling_sources import ChannelSource, layer_source, vector_source

__all__ = ["MigrateOutliers"]


@dataclass(frozen=True)
class MigrateOutliers(RewritePass):
    """SmoothQuant (Xiao et al. 2023, section 4), for all tensors that only layers read, whatever writes them. Costs
    nothing at run time.

    Given:   normalization, Mul by a vector [→ Add of a vector], or layer → x → [what passes factors on] → layer1
             (weight W1), layer2, …
    Result:  the same → x/s → layer1 (W1·s), …; the s of least expected error (``numeric.channel_noise``)
    Kept when x is returned or also read by something else (as the residual reads what is normalized last), a weight is
    computed, shared or overridable, an operator between does not pass factors on, x was not finite, the weights would
    overflow, or no s makes the error 5 % less.

    ``weights``, ``activations``: bits to expect; 32 for those that stay in float. Where rounding will be compensated,
    one bit more comes closer.
    """

    name: ClassVar[str] = "migrate-outliers"
    weights: int = 8
    activations: int = 8

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        shapes = {name: tensor.shape for name, tensor in context.analyses.get(RecordedTensors).items()}
        sites, notes = find_sites(graph, lambda node, kept: _source(graph, node, kept), shapes)
        sites, nested = _apart(sites)
        ranges = observed(sites, context.analyses)
        modified = False
        # From the end: what a layer writes is scaled before what it reads, so its weight is final when it is looked at.
        for site in reversed(sites):
            factors = factors_of(site, ranges, self.weights, self.activations)
            if isinstance(factors, str):
                notes.append(Note(site.name, factors))
            elif is_worth_it(factors):
                reason = move(site, factors)
                notes += [Note(site.name, reason)] if reason else []
                modified |= not reason
        return PassResult(modified, (*notes, *nested))


def _source(graph: Graph, node: gs.Node, kept: frozenset[int]) -> ChannelSource | str | None:
    return vector_source(graph, node, kept) or layer_source(graph, node, kept)


def _apart(sites: list[Site]) -> tuple[list[Site], list[Note]]:
    """Sites that share no reader, in graph order: of nested ones the innermost."""
    taken: dict[int, Site] = {}
    chosen, notes = [], []
    for site in reversed(sites):
        inner = next((taken[id(reader.node)] for reader in site.readers if id(reader.node) in taken), None)
        if inner is not None:
            notes.append(Note(site.name, f"its readers take their factors from '{inner.name}'"))
            continue
        taken |= {id(reader.node): site for reader in site.readers}
        chosen.append(site)
    return chosen[::-1], notes
