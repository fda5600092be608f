"""Hutchinson's estimator for one layer: random weight changes, and the Hessian diagonal that their losses give.

The float model is its own label, so the loss' gradient vanishes at its weights and one forward gives
``vᵀHv = 2·loss(w + v)``; with Rademacher ``v`` its mean is the trace of H weighted by the squared amplitude (HAWQ-V2,
section 3.1). Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.tables import HessianDiagonal

__all__ = ["LayerProbe", "ProbeLosses", "channel_rows"]

Float = NDArray[np.float32]
Double = NDArray[np.float64]

# A probe is a quarter of a 4-bit rounding error: small enough for second order to rule, large enough for float32
# outputs (2·loss/‖v‖² is flat within a few per cent from 0.003 to 1 of a rounding error).
_FORMAT_BITS = 4
_SHARE = 0.25


def channel_rows(weight: Float, axis: int | None) -> Float:
    """Weight as [channels, elements of a channel]; one row without a channel axis."""
    return weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


@dataclass(frozen=True, eq=False)
class ProbeLosses:
    """What probes of one layer cost. ``loss``, ``squared_error``: [probes, samples] of whole-layer draws.
    ``block_loss``, ``block``: [block probes, samples], the loss of moving one block and which; may be empty.
    """

    loss: Double
    squared_error: Double
    block_loss: Double
    block: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """Random changes of one layer's weight, and the Hessian diagonal that follows from their losses.

    Two kinds of change. ``whole``: all weights, amplitude per channel like the channel's rounding error, so that the
    mean loss is already in proportion to what rounding costs. ``block``: each draw moves one block of output channels;
    a block's share of the layer is the ratio of its loss to the whole layer's on the same samples, which cancels how
    much curvature differs from sample to sample.
    """

    weight: Float
    axis: int | None

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.weight.size

    @cached_property
    def amplitude(self) -> Float:
        """[channels]: what a probe moves each weight by."""
        rounded = round_nearest(self.weight, QFormat(bits=_FORMAT_BITS, axis=self.axis)).dequantized()
        errors = channel_rows(rounded, self.axis) - channel_rows(self.weight, self.axis)
        result: Float = _SHARE * np.sqrt((errors**2).mean(axis=1))
        return result

    def whole(self, generators: Sequence[np.random.Generator]) -> Float:
        """[draws, *weight shape]: signs times the channel's amplitude, one draw from each generator."""
        return self._signs(generators, np.broadcast_to(self.amplitude, (len(generators), self._channels)))

    def block(self, generators: Sequence[np.random.Generator], chosen: NDArray[np.intp], count: int) -> Float:
        """As ``whole``, each draw within block ``chosen`` of ``count``."""
        mask = self._block(count)[None, :] == chosen[:, None]
        return self._signs(generators, mask * self.amplitude)

    def diagonal(self, losses: ProbeLosses, count: int) -> HessianDiagonal:
        """The diagonal from all losses; ``count``: blocks that ``losses.block`` counts."""
        loss = losses.loss.mean(axis=0)
        mean = float(loss.mean())
        relative_stderr = float(loss.std(ddof=1) / np.sqrt(len(loss)) / mean) if len(loss) > 1 and mean > 0 else 0.0
        share, share_stderr = _shares(losses, count)
        block = self._block(count)
        power = np.bincount(block, weights=self.amplitude.astype(np.float64) ** 2 * self._channel_elements)
        per_weight = np.divide(2 * mean, power, out=np.zeros_like(power), where=power > 0)
        channel_mean = (share * per_weight)[block]
        trace = float(channel_mean.sum() * self._channel_elements)
        weights_of_block = np.bincount(block) * self._channel_elements
        shares_stderr = float(np.sqrt(((share_stderr * per_weight * weights_of_block) ** 2).sum()))
        return HessianDiagonal(
            trace=trace,
            trace_stderr=float(np.hypot(trace * relative_stderr, shares_stderr)),
            relative_stderr=relative_stderr,
            squared_error_per_loss=float(losses.squared_error.mean() / mean) if mean > 0 else 0.0,
            channel_mean=tuple(channel_mean.tolist()),
            channel_stderr=tuple((share_stderr * per_weight)[block].tolist()),
            samples=len(loss),
        )

    @property
    def _channels(self) -> int:
        return 1 if self.axis is None else int(self.weight.shape[self.axis])

    @property
    def _channel_elements(self) -> int:
        return self.weight.size // max(1, self._channels)

    def _block(self, count: int) -> NDArray[np.intp]:
        """Block of each channel."""
        return np.arange(self._channels) * count // self._channels

    def _signs(self, generators: Sequence[np.random.Generator], amplitude: NDArray[np.floating]) -> Float:
        words = -(-self.elements // 8)
        bits = np.unpackbits(
            np.frombuffer(b"".join(g.bytes(words) for g in generators), np.uint8).reshape(-1, words), 1
        )
        values = bits[:, : self.elements].astype(np.float32).reshape(-1, self._channels, self._channel_elements)
        values -= 0.5
        values *= (2 * amplitude).astype(np.float32)[:, :, None]
        if self.axis is None:
            return values.reshape(len(values), *self.weight.shape)
        rest = [extent for position, extent in enumerate(self.weight.shape) if position != self.axis]
        moved = np.moveaxis(values.reshape(len(values), self._channels, *rest), 1, self.axis + 1)
        return np.ascontiguousarray(moved)


def _shares(losses: ProbeLosses, count: int) -> tuple[Double, Double]:
    """Each block's part of the layer's loss (adds up to 1) with standard errors, by ratio estimation."""
    even = np.full(count, 1.0 / count)
    if count == 1 or not losses.block_loss.size:
        return even, np.zeros(count)
    whole = np.broadcast_to(losses.loss.mean(axis=0), losses.block_loss.shape).ravel()
    chosen, loss = losses.block.ravel(), losses.block_loss.ravel()
    below = np.bincount(chosen, weights=whole, minlength=count)
    above = np.bincount(chosen, weights=loss, minlength=count)
    share = np.divide(above, below, out=even.copy(), where=below > 0)
    residual = np.bincount(chosen, weights=(loss - share[chosen] * whole) ** 2, minlength=count)
    stderr = np.divide(np.sqrt(residual), below, out=np.zeros(count), where=below > 0)
    total = share.sum()
    return (share / total, stderr / total) if total > 0 else (even, stderr)
