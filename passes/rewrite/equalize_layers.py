"""equalize-layers: what one layer multiplies a channel by more than another, the next layer makes up for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.pass_base import Note, PassContext, PassResult, RewritePass

from .linear_layer import Floats, LinearLayer
from .scaling_sites import Site, find_sites, is_live, is_worth_it, move
from .scaling_sources import LayerSource, layer_source

__all__ = ["EqualizeLayers"]

_MOST_ROUNDS = 2000
"""A chain of twenty depthwise layers takes some hundred."""
_CONVERGED = 1e-4


@dataclass(frozen=True)
class EqualizeLayers(RewritePass):
    """Cross-layer equalization (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.1), for chains of any length, depthwise ones included. Needs no data.

    Given:   layer1 (weight W1, bias b) → t → [what passes factors on] → layer2 (weight W2), layer3, …
    Result:  layer1 (W1/s, b/s) → t/s → layer2 (W2·s), …; in each channel the largest of |W1/s| and |b/s| is the largest
             of |W2·s|, |W3·s|, …
    Kept when t is returned or also read by something else, a weight is computed, shared or overridable, an operator
    between does not pass factors on (a Clip with an end does not: its end would differ by channel), or the weights
    would overflow.

    A bias counts as the weight of an input that is always one. Without it, a channel that all but consists of its bias
    would get equal weights for a huge activation.
    """

    name: ClassVar[str] = "equalize-layers"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        sites, notes = find_sites(graph, lambda node, kept: layer_source(graph, node, kept))
        modified = False
        for site, factors in zip(sites, _Balance(sites).factors(), strict=True):
            if not is_worth_it(factors):
                continue
            reason = move(site, factors)
            if reason:
                notes.append(Note(site.name, reason))
            else:
                modified = True
        return PassResult(modified, tuple(notes))


class _Balance:
    """Factors of all sites, found together on magnitudes alone: a layer may end one site and begin another."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._weights: dict[int, Floats] = {}
        self._biases: list[Floats] = []
        for site in sites:
            layer = _layer_of(site)
            self._weights.setdefault(id(layer.node), layer.axes.magnitudes(layer.weight.values))
            self._biases.append(_bias_magnitudes(layer))
            for reader in site.readers:
                self._weights.setdefault(id(reader.node), reader.axes.magnitudes(reader.weight.values))
        sides = (self._sides(index) for index in range(len(sites)))
        self._live = [(is_live(before) & is_live(after)) for before, after in sides]

    def factors(self) -> list[Floats]:
        """[channels] of each site."""
        total = [np.ones(site.source.channels) for site in self._sites]
        touching = self._touching()
        pending = set(range(len(self._sites)))
        for _ in range(_MOST_ROUNDS):
            now, pending = sorted(pending), set()
            for index in now:
                step = self._step(index)
                if np.abs(step - 1).max() <= _CONVERGED:
                    continue
                total[index] *= step
                self._apply(index, step)
                pending |= touching[index]
            if not pending:
                break
        return total

    def _touching(self) -> list[set[int]]:
        """For each site the others that share a layer with it."""
        layers = [{id(_layer_of(site).node), *(id(reader.node) for reader in site.readers)} for site in self._sites]
        return [
            {other for other, its in enumerate(layers) if other != at and own & its} for at, own in enumerate(layers)
        ]

    def _step(self, index: int) -> Floats:
        """What makes both sides equal: the square root of their ratio; one where there is nothing to make equal."""
        before, after = self._sides(index)
        live = self._live[index]
        return np.sqrt(np.where(live, before, 1) / np.where(live, after, 1))

    def _sides(self, index: int) -> tuple[Floats, Floats]:
        """Largest magnitudes [channels] of what writes and what reads the site's tensor."""
        site = self._sites[index]
        before = np.maximum(self._weights[id(_layer_of(site).node)].max(axis=2).ravel(), self._biases[index])
        after = np.zeros_like(before)
        for reader in site.readers:
            largest = self._weights[id(reader.node)].max(axis=1).ravel()
            np.maximum.at(after, reader.channel_of, largest)
        return before, after

    def _apply(self, index: int, step: Floats) -> None:
        site = self._sites[index]
        before = self._weights[id(_layer_of(site).node)]
        before /= step.reshape(before.shape[0], -1, 1)
        self._biases[index] = self._biases[index] / step
        for reader in site.readers:
            after = self._weights[id(reader.node)]
            after *= step[reader.channel_of].reshape(after.shape[0], 1, -1)


def _layer_of(site: Site) -> LinearLayer:
    assert isinstance(site.source, LayerSource)
    return site.source.layer


def _bias_magnitudes(layer: LinearLayer) -> Floats:
    bias = layer.bias()
    assert not isinstance(bias, str), "such a layer is no source"
    return np.zeros(layer.channels) if bias is None else np.abs(bias)
