"""Factors that move range from a tensor to the layers that read it, chosen by the noise that is to be expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.channel_noise import LayerNoise, best_factors

from ..analysis.channel_ranges import ChannelRange, ChannelRanges
from .linear_layer import Floats
from .scaling_sites import Reader, Site

__all__ = ["factors_of", "gain_of", "observed"]


def observed(sites: Iterable[Site], analyses: AnalysisManager) -> dict[str, ChannelRange]:
    """Ranges of all tensors that the sites' layers read, by name."""
    inputs = frozenset((reader.node.inputs[0].name, reader.axis) for site in sites for reader in site.readers)
    return analyses.get(ChannelRanges(inputs))


def factors_of(site: Site, ranges: Mapping[str, ChannelRange], weight_bits: int, activation_bits: int) -> Floats | str:
    """[channels], or why there are none."""
    if not all(ranges[reader.node.inputs[0].name].is_finite for reader in site.readers):
        return f"'{site.name}' is not finite for all calibration data"
    layers = [_noise_of(reader, ranges) for reader in site.readers]
    return best_factors(layers, site.source.channels, weight_bits, activation_bits)


def gain_of(
    site: Site, ranges: Mapping[str, ChannelRange], factors: Floats, weight_bits: int, activation_bits: int
) -> float:
    """Expected error as things are over that with ``factors``; 1 where there is none."""
    layers = [_noise_of(reader, ranges) for reader in site.readers]
    now = sum(layer.error(np.ones_like(factors), weight_bits, activation_bits) for layer in layers)
    then = sum(layer.error(factors, weight_bits, activation_bits) for layer in layers)
    return now / then if then > 0 else 1.0


def _noise_of(reader: Reader, ranges: Mapping[str, ChannelRange]) -> LayerNoise:
    """The layer as it is now."""
    seen = ranges[reader.node.inputs[0].name]
    weight = reader.weight.values
    return LayerNoise(
        low=seen.low,
        high=seen.high,
        mean_square=seen.mean_square,
        magnitudes=reader.axes.magnitudes(weight),
        squares=reader.axes.squares(weight),
        kernel=reader.axes.kernel,
        channel_of=reader.channel_of,
    )
