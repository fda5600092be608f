"""What rounding the input and the weights of a layer does to its output, channel by channel of the input; and factors
that move range from one to the other. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LayerNoise", "best_factors"]

Floats = NDArray[np.float64]

_STRENGTHS = np.linspace(0, 1, 11)
_LEAST_GAIN = 0.05
_MOST_STEPS = 8
_LEAST_RANGE = 1e-3
"""Channels narrower than this share of the widest were hardly used; what other data may bring is not to be driven out
of range.
"""
_DEAD = 1e-6


@dataclass(frozen=True, eq=False)
class LayerNoise:
    """A layer's input and weight as far as its rounding noise depends on them.

    ``low``, ``high``, ``mean_square`` [inputs]: of the input's channels. ``magnitudes``, ``squares``
    [groups, outputs / groups, inputs / groups]: the largest magnitude and the sum of squares of each kernel, which has
    ``kernel`` weights. ``channel_of`` [inputs]: to which channel's factor each one belongs.
    """

    low: Floats
    high: Floats
    mean_square: Floats
    magnitudes: Floats
    squares: Floats
    kernel: int
    channel_of: NDArray[np.intp]

    def error(self, factors: Floats, weight_bits: int, activation_bits: int) -> float:
        """Expected squared error of the output over its mean square, channels taken as independent, when input channels
        are divided by their ``factors`` [channels] and weights multiplied, both rounded to nearest: the weights with
        one symmetric scale for each output, the input with a single scale and zero point.
        """
        spread = factors[self.channel_of]
        by_group = spread.reshape(len(self.magnitudes), 1, -1)
        energy = self.squares.sum(axis=1).ravel()
        signal = float(self.mean_square @ energy)
        if signal == 0:
            return 0.0
        low, high = min(0.0, float((self.low / spread).min())), max(0.0, float((self.high / spread).max()))
        input_step = (high - low) / (2.0**activation_bits - 1)
        weight_steps = (self.magnitudes * by_group).max(axis=2) / (2.0 ** (weight_bits - 1) - 1)
        seen = (self.mean_square / spread**2).reshape(len(self.magnitudes), -1).sum(axis=1)
        from_input = input_step**2 * float((spread**2) @ energy)
        from_weights = self.kernel * float((weight_steps**2).sum(axis=1) @ seen)
        return (from_input + from_weights) / 12 / signal


def best_factors(layers: Sequence[LayerNoise], channels: int, weight_bits: int, activation_bits: int) -> Floats:
    """Factors [channels] of least error, summed over ``layers``, which all read the same channels: range^a of the input
    over range^(1 - a) of the weights, from SmoothQuant (Xiao et al. 2023, equation 4), range being the largest
    magnitude or the root of the mean square, whichever a and range are best; then the same from there, as long as it
    gains 5 %. All ones if nothing gains that.
    """

    def error(factors: Floats) -> float:
        return sum(layer.error(factors, weight_bits, activation_bits) for layer in layers)

    largest = _Sides(
        _gathered(layers, channels, lambda layer: np.maximum(-layer.low, layer.high)),
        _gathered(layers, channels, lambda layer: layer.magnitudes.max(axis=1).ravel()),
    )
    typical = _Sides(
        _gathered(layers, channels, lambda layer: np.sqrt(layer.mean_square)),
        _gathered(layers, channels, lambda layer: np.sqrt(layer.squares.sum(axis=1).ravel())),
    )
    live = largest.live()
    factors = np.ones(channels)
    now = error(factors)
    for _ in range(_MOST_STEPS if live.any() else 0):
        steps = [sides.ratio(a, live, factors) for sides in (largest, typical) for a in _STRENGTHS]
        errors = [error(factors * step) for step in steps]
        best = int(np.argmin(errors))
        if not errors[best] < (1 - _LEAST_GAIN) * now:
            break
        factors, now = factors * steps[best], errors[best]
    return factors


@dataclass(frozen=True, eq=False)
class _Sides:
    """Ranges [channels] of the input and of the weights that multiply it."""

    values: Floats
    weights: Floats

    def live(self) -> NDArray[np.bool_]:
        """Channels that both sides use."""
        is_live: NDArray[np.bool_] = (self.values > _LEAST_RANGE * self.values.max()) & (
            self.weights > _DEAD * self.weights.max()
        )
        return is_live

    def ratio(self, strength: float, live: NDArray[np.bool_], factors: Floats) -> Floats:
        """The step from ``factors``; channels that are not live go with the mean of the others."""
        values, weights = self.values[live] / factors[live], self.weights[live] * factors[live]
        logs = np.zeros_like(factors)
        logs[live] = strength * np.log(values) - (1 - strength) * np.log(weights)
        logs[live] -= logs[live].mean()
        return np.exp(logs)


def _gathered(layers: Sequence[LayerNoise], channels: int, of: Callable[[LayerNoise], Floats]) -> Floats:
    """Largest of what ``of`` gives [inputs] for each of the shared channels."""
    result = np.zeros(channels)
    for layer in layers:
        np.maximum.at(result, layer.channel_of, of(layer))
    return result
