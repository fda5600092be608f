"""Hutchinson's estimator for one layer: random weight changes, and the Hessian diagonal that their losses give.

The float model is its own label, so the loss' gradient vanishes at its weights and one forward gives
``vᵀHv = 2·loss(w + v)``; with Rademacher ``v`` its mean is the trace of H weighted by the squared amplitude (HAWQ-V2,
section 3.1). Pure numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.tables import HessianDiagonal

__all__ = ["LayerProbe", "channel_rows"]

Float = NDArray[np.float32]
Double = NDArray[np.float64]

# A probe is a quarter of a 4-bit rounding error: small enough for second order to rule, large enough for float32
# outputs (2·loss/‖v‖² is flat within a few per cent from 0.003 to 1 of a rounding error).
_FORMAT_BITS = 4
_SHARE = 0.25


def channel_rows(weight: Float, axis: int | None) -> Float:
    """Weight as [channels, elements of a channel]; one row without a channel axis."""
    return weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


class LayerProbe:
    """Draws changes of one layer's weight and gathers the losses they cause.

    Two kinds of change. ``whole``: all weights, amplitude per channel like the channel's rounding error, so that the
    mean loss is already in proportion to what rounding costs. ``blocks``: each draw moves one block of output
    channels; a block's share of the layer is the ratio of its loss to the whole layer's on the same samples, which
    cancels how much curvature differs from sample to sample.
    """

    def __init__(self, weight: Float, axis: int | None, samples: int) -> None:
        """``samples``: how many the analysis will see; blocks are chosen so that each gets about two of them."""
        self._axis = axis
        self._shape = weight.shape
        rows = channel_rows(weight, axis)
        self._channels, self._elements = int(rows.shape[0]), int(rows.shape[1])
        rounded = round_nearest(weight, QFormat(bits=_FORMAT_BITS, axis=axis)).dequantized()
        self._amplitude = _SHARE * np.sqrt(((channel_rows(rounded, axis) - rows) ** 2).mean(axis=1))
        self._block_count = max(1, min(self._channels, samples // 2))
        self._block = np.arange(self._channels) * self._block_count // self._channels
        self._loss: list[Double] = []
        self._squared: list[Double] = []
        self._block_parts: list[tuple[NDArray[np.intp], Double, Double]] = []
        self._next_block = 0

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self._channels * self._elements

    def whole(self, draws: int, random: np.random.Generator) -> Float:
        """[draws, *weight shape]: signs times the channel's amplitude."""
        return self._signs(draws, random, np.broadcast_to(self._amplitude, (draws, self._channels)))

    def blocks(self, draws: int, random: np.random.Generator) -> tuple[Float, NDArray[np.intp]]:
        """Changes of one block each, and which block; consecutive calls go on through the blocks."""
        chosen = (self._next_block + np.arange(draws)) % self._block_count
        # One more where the draws come out even: probed again, a sample then meets the next block and not the same one.
        step = draws + int(draws % self._block_count == 0)
        self._next_block = int(self._next_block + step) % self._block_count
        mask = self._block[None, :] == chosen[:, None]
        return self._signs(draws, random, mask * self._amplitude), chosen

    def add_whole(self, losses: Double, squared_errors: Double) -> None:
        """``losses``, ``squared_errors``: [probes, samples] of one batch."""
        self._loss.append(losses.mean(axis=0))
        self._squared.append(squared_errors.mean(axis=0))

    def add_blocks(self, chosen: NDArray[np.intp], losses: Double) -> None:
        """Losses [samples] of a block draw on the batch last given to ``add_whole``; draws share samples evenly."""
        self._block_parts.append((np.repeat(chosen, len(losses) // len(chosen)), losses, self._loss[-1]))

    def estimate(self) -> HessianDiagonal:
        """The diagonal from all losses so far."""
        loss, squared = np.concatenate(self._loss), np.concatenate(self._squared)
        mean = float(loss.mean())
        relative_stderr = float(loss.std(ddof=1) / np.sqrt(len(loss)) / mean) if len(loss) > 1 and mean > 0 else 0.0
        share, share_stderr = self._shares()
        power = np.bincount(self._block, weights=self._amplitude.astype(np.float64) ** 2 * self._elements)
        per_weight = np.divide(2 * mean, power, out=np.zeros_like(power), where=power > 0)
        channel_mean = (share * per_weight)[self._block]
        trace = float(channel_mean.sum() * self._elements)
        weights_of_block = np.bincount(self._block) * self._elements
        shares_stderr = float(np.sqrt(((share_stderr * per_weight * weights_of_block) ** 2).sum()))
        return HessianDiagonal(
            trace=trace,
            trace_stderr=float(np.hypot(trace * relative_stderr, shares_stderr)),
            relative_stderr=relative_stderr,
            squared_error_per_loss=float(squared.mean() / mean) if mean > 0 else 0.0,
            channel_mean=tuple(channel_mean.tolist()),
            channel_stderr=tuple((share_stderr * per_weight)[self._block].tolist()),
            samples=len(loss),
        )

    def _shares(self) -> tuple[Double, Double]:
        """Each block's part of the layer's loss (adds up to 1) with standard errors, by ratio estimation."""
        even = np.full(self._block_count, 1.0 / self._block_count)
        if not self._block_parts or self._block_count == 1:
            return even, np.zeros(self._block_count)
        chosen, loss, whole = (np.concatenate(part) for part in zip(*self._block_parts, strict=True))
        below = np.bincount(chosen, weights=whole, minlength=self._block_count)
        above = np.bincount(chosen, weights=loss, minlength=self._block_count)
        share = np.divide(above, below, out=even.copy(), where=below > 0)
        residual = np.bincount(chosen, weights=(loss - share[chosen] * whole) ** 2, minlength=self._block_count)
        stderr = np.divide(np.sqrt(residual), below, out=np.zeros(self._block_count), where=below > 0)
        total = share.sum()
        return (share / total, stderr / total) if total > 0 else (even, stderr)

    def _signs(self, draws: int, random: np.random.Generator, amplitude: NDArray[np.floating]) -> Float:
        count = draws * self.elements
        bits = np.unpackbits(np.frombuffer(random.bytes(-(-count // 8)), np.uint8), count=count)
        values = bits.astype(np.float32).reshape(draws, self._channels, self._elements)
        values -= 0.5
        values *= (2 * amplitude).astype(np.float32)[:, :, None]
        if self._axis is None:
            return values.reshape(draws, *self._shape)
        rest = [extent for position, extent in enumerate(self._shape) if position != self._axis]
        moved = np.moveaxis(values.reshape(draws, self._channels, *rest), 1, self._axis + 1)
        return np.ascontiguousarray(moved)
