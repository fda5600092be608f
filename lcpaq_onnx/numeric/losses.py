"""Teacher losses: how far changed outputs are from the float model's own, per sample. Pure numpy, float64 inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.errors import UsageError

__all__ = [
    "LossName",
    "OutputScale",
    "TeacherLoss",
    "agreement",
    "choose_loss",
    "relative_squared_error",
    "teacher_loss",
]

Outputs = Mapping[str, NDArray[np.generic]]
LossName = Literal["auto", "kl-logits", "kl-probabilities", "squared-error"]
Losses = NDArray[np.float64]
TeacherLoss = Callable[[Outputs, Outputs], Losses]
"""(float model's outputs, changed model's outputs) → one loss ≥ 0 per sample, samples along axis 0."""


@dataclass(frozen=True)
class OutputScale:
    """What ``1.0`` error means for each float output: its range (maximum − minimum) over the calibration data, and its
    mean square.
    """

    range: Mapping[str, float]
    mean_square: Mapping[str, float]


class OutputScaleStream:
    """Gathers an ``OutputScale`` from batches of the float model's outputs; memory does not grow."""

    def __init__(self) -> None:
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._square: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def update(self, outputs: Outputs) -> None:
        """Count one batch; infinite and undefined values (masked scores) are left out."""
        for name, value in outputs.items():
            if not np.issubdtype(value.dtype, np.floating):
                continue
            finite = value[np.isfinite(value)].astype(np.float64)
            self._low[name] = min(self._low.get(name, np.inf), float(finite.min(initial=np.inf)))
            self._high[name] = max(self._high.get(name, -np.inf), float(finite.max(initial=-np.inf)))
            self._square[name] = self._square.get(name, 0.0) + float((finite**2).sum())
            self._count[name] = self._count.get(name, 0) + finite.size

    def result(self) -> OutputScale:
        """A constant or never finite output counts with scale 1."""
        spread = {name: self._high[name] - self._low[name] for name in self._low if self._count[name]}
        square = {name: self._square[name] / self._count[name] for name in spread}
        names = self._low
        return OutputScale(
            {name: spread.get(name, 0.0) or 1.0 for name in names},
            {name: square.get(name, 0.0) or 1.0 for name in names},
        )


def choose_loss(batches: Sequence[Outputs]) -> LossName:
    """The loss that fits the outputs: KL for class scores, normalised squared error otherwise.

    Class scores are a single float output of shape [samples, classes ≥ 2]: probabilities when every row is
    non-negative and adds up to 1 within 1e-3, else logits.
    """
    floats = {name for batch in batches for name, v in batch.items() if np.issubdtype(v.dtype, np.floating)}
    if len(floats) != 1 or not batches:
        return "squared-error"
    values = [np.asarray(batch[next(iter(floats))], np.float64) for batch in batches]
    if any(v.ndim != 2 or v.shape[1] < 2 for v in values):
        return "squared-error"
    rows = np.concatenate(values)
    is_distribution = rows.min(initial=0) >= 0 and bool(np.all(np.abs(rows.sum(axis=1) - 1) < 1e-3))
    return "kl-probabilities" if is_distribution else "kl-logits"


def teacher_loss(name: LossName, scale: OutputScale) -> TeacherLoss:
    """The named loss; ``auto`` must be resolved with ``choose_loss`` first."""
    if name == "kl-logits":
        return lambda teacher, changed: _kl(teacher, changed, _log_softmax)
    if name == "kl-probabilities":
        return lambda teacher, changed: _kl(teacher, changed, _log_clipped)
    if name == "squared-error":
        return lambda teacher, changed: _squared(teacher, changed, scale.mean_square)
    raise UsageError(f"loss '{name}' is not known", hint="use kl-logits, kl-probabilities, squared-error, or auto")


def relative_squared_error(teacher: Outputs, changed: Outputs, scale: OutputScale) -> Losses:
    """Mean squared error over the squared range of the output, per sample; the worst output counts."""
    return _squared(teacher, changed, {name: value**2 for name, value in scale.range.items()}, worst=True)


def agreement(teacher: Outputs, changed: Outputs) -> float:
    """Share of samples whose largest class score stays the same."""
    (name,) = [key for key, value in teacher.items() if np.issubdtype(value.dtype, np.floating)]
    return float(np.mean(teacher[name].argmax(axis=-1) == changed[name].argmax(axis=-1)))


def _squared(teacher: Outputs, changed: Outputs, divisor: Mapping[str, float], *, worst: bool = False) -> Losses:
    parts = []
    for name, value in divisor.items():
        difference = np.asarray(changed[name], np.float64) - np.asarray(teacher[name], np.float64)
        # Equal infinities (masked scores) differ by nan; they are equal.
        difference = np.where(np.asarray(teacher[name]) == np.asarray(changed[name]), 0.0, difference)
        rows = difference.reshape(len(difference), -1) if difference.ndim else difference.reshape(1, 1)
        parts.append((rows**2).mean(axis=1) / value if rows.size else np.zeros(len(rows)))
    if not parts:
        raise UsageError("the model has no float output to compare", hint="pass a loss of your own (Python API)")
    samples = max(len(part) for part in parts)
    # An output without a sample axis stands for every sample.
    stacked = np.stack([part if len(part) == samples else np.full(samples, part.mean()) for part in parts])
    result: Losses = stacked.max(axis=0) if worst else stacked.sum(axis=0)
    return result


def _kl(teacher: Outputs, changed: Outputs, log_of: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Losses:
    total: Losses | None = None
    for name, value in teacher.items():
        if not np.issubdtype(value.dtype, np.floating):
            continue
        p, q = log_of(value.astype(np.float64)), log_of(changed[name].astype(np.float64))
        kl = (np.exp(p) * (p - q)).sum(axis=-1)
        # Rounding of float32 outputs can leave −1e-9.
        kl = np.maximum(kl, 0.0).reshape(len(kl), -1).mean(axis=1)
        total = kl if total is None else total + kl
    if total is None:
        raise UsageError("the model has no float output to compare", hint="pass a loss of your own (Python API)")
    return total


def _log_softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    z = z - z.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return result


def _log_clipped(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of probabilities; below 1e-12 a float32 softmax has no digits left."""
    result: NDArray[np.float64] = np.log(np.clip(p, 1e-12, None))
    return result
