"""Teacher losses: how far changed outputs are from the float model's own, per sample. Pure numpy, float64 inside.

The built-in losses are frozen values: they can be compared, printed, hashed into keys and sent to other processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.errors import UsageError

__all__ = [
    "BuiltinLoss",
    "KullbackLeibler",
    "LossName",
    "OutputScale",
    "OutputScaleStream",
    "SquaredError",
    "TeacherLoss",
    "agreement",
    "choose_loss",
    "fitting_loss",
    "relative_squared_error",
    "softening_temperature",
    "teacher_loss",
]

Outputs = Mapping[str, NDArray[np.generic]]
LossName = Literal["auto", "kl-logits", "kl-probabilities", "squared-error"]
Losses = NDArray[np.float64]

# A float model that is surer than this of its calibration samples is softened: networks are too sure of what they were
# trained on, and where nothing is undecided a change shows no effect that it would have on other inputs.
_MOST_CONFIDENT = 0.95
_HOTTEST = 20.0
_NO_FLOAT = "pass a loss of your own (Python API)"


class TeacherLoss(Protocol):
    """(float model's outputs, changed model's outputs) → one loss ≥ 0 per sample, samples along axis 0."""

    def __call__(self, teacher: Outputs, changed: Outputs, /) -> Losses: ...


@runtime_checkable
class BuiltinLoss(TeacherLoss, Protocol):
    """A loss that is also a metric: it can say in which direction outputs moved. ``str`` of it is its name."""

    @property
    def decides(self) -> bool:
        """Whether the outputs are class scores."""

    def embed(self, teacher: Outputs, changed: Outputs) -> NDArray[np.float64]:
        """[samples, k] with ½‖row‖² ≈ the sample's loss for small changes: differences of the outputs times the root of
        the loss' Hessian by them (for KL the Fisher information of the softmax). Rows of several changes add up where
        the changes do.
        """


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


def softening_temperature(batches: Sequence[Outputs], name: LossName) -> float:
    """The temperature ≥ 1, to two decimals, at which the mean largest probability is at most 0.95; at most 20.

    Dividing the logits by it is what distillation does to a teacher (Hinton et al. 2015).
    """
    log_of = _log_clipped if name == "kl-probabilities" else _identity
    rows = np.concatenate([log_of(np.asarray(v, np.float64)) for batch in batches for v in _floats(batch).values()])
    confidence = [float(np.exp(_log_softmax(rows / t)).max(axis=-1).mean()) for t in (1.0, _HOTTEST)]
    if confidence[0] <= _MOST_CONFIDENT:
        return 1.0
    if confidence[1] > _MOST_CONFIDENT:
        return _HOTTEST
    low, high = 1.0, _HOTTEST
    while high - low > 0.005:
        middle = (low + high) / 2
        is_sure = float(np.exp(_log_softmax(rows / middle)).max(axis=-1).mean()) > _MOST_CONFIDENT
        low, high = (middle, high) if is_sure else (low, middle)
    return round(high, 2)


def fitting_loss(batches: Sequence[Outputs], scale: OutputScale) -> BuiltinLoss:
    """What ``auto`` stands for: ``choose_loss``, class scores softened by ``softening_temperature``."""
    name = choose_loss(batches)
    return teacher_loss(name, scale, 1.0 if name == "squared-error" else softening_temperature(batches, name))


def teacher_loss(name: LossName, scale: OutputScale, temperature: float = 1.0) -> BuiltinLoss:
    """The named loss; ``auto`` must be resolved with ``fitting_loss`` first."""
    if name in ("kl-logits", "kl-probabilities"):
        return KullbackLeibler(name == "kl-probabilities", temperature)
    if name == "squared-error":
        return SquaredError(tuple(sorted(scale.mean_square.items())))
    raise UsageError(f"loss '{name}' is not known", hint="use kl-logits, kl-probabilities, squared-error, or auto")


@dataclass(frozen=True)
class KullbackLeibler:
    """T²·KL(teacher ‖ changed) of the softmaxes at temperature T, in nats; at T = 1 the plain divergence. T² keeps the
    second order comparable: ½ Δzᵀ F Δz with the Fisher information F of the softened softmax.
    """

    of_probabilities: bool = False
    temperature: float = 1.0

    @property
    def decides(self) -> bool:
        return True

    def __call__(self, teacher: Outputs, changed: Outputs, /) -> Losses:
        total: Losses | None = None
        for name, value in _floats(teacher).items():
            p, q = self._logs(value), self._logs(changed[name])
            kl = (np.exp(p) * (p - q)).sum(axis=-1)
            # Rounding of float32 outputs can leave −1e-9.
            kl = self.temperature**2 * np.maximum(kl, 0.0).reshape(len(kl), -1).mean(axis=1)
            total = kl if total is None else total + kl
        if total is None:
            raise UsageError("the model has no float output to compare", hint=_NO_FLOAT)
        return total

    def embed(self, teacher: Outputs, changed: Outputs) -> NDArray[np.float64]:
        parts = []
        for name, value in _floats(teacher).items():
            p, moved = np.exp(self._logs(value)), self._scores(changed[name]) - self._scores(value)
            centred = moved - (p * moved).sum(axis=-1, keepdims=True)
            rows = (np.sqrt(p) * centred).reshape(len(p), -1)
            parts.append(rows * np.sqrt(p.shape[-1] / rows.shape[1]))  # the loss is a mean over positions
        return np.concatenate(parts, axis=1)

    def __str__(self) -> str:
        name = "kl-probabilities" if self.of_probabilities else "kl-logits"
        return name if self.temperature == 1 else f"{name} at temperature {self.temperature:g}"

    def _scores(self, value: NDArray[np.generic]) -> NDArray[np.float64]:
        wide = np.asarray(value, np.float64)
        return _log_clipped(wide) if self.of_probabilities else wide

    def _logs(self, value: NDArray[np.generic]) -> NDArray[np.float64]:
        scores = self._scores(value)
        if self.temperature == 1:
            return scores if self.of_probabilities else _log_softmax(scores)
        return _log_softmax(scores / self.temperature)


@dataclass(frozen=True)
class SquaredError:
    """Mean squared error of each output over ``mean_square`` of that output, outputs added."""

    mean_square: tuple[tuple[str, float], ...]

    @property
    def decides(self) -> bool:
        return False

    def __call__(self, teacher: Outputs, changed: Outputs, /) -> Losses:
        return _squared(teacher, changed, dict(self.mean_square))

    def embed(self, teacher: Outputs, changed: Outputs) -> NDArray[np.float64]:
        parts = []
        for name, square in self.mean_square:
            rows = _difference(teacher[name], changed[name])
            parts.append(rows * np.sqrt(2 / (max(1, rows.shape[1]) * square)))
        samples = max(len(part) for part in parts)
        # An output without a sample axis stands for every sample.
        return np.concatenate([part if len(part) == samples else part.repeat(samples, 0) for part in parts], axis=1)

    def __str__(self) -> str:
        return "squared-error"


def relative_squared_error(teacher: Outputs, changed: Outputs, scale: OutputScale) -> Losses:
    """Mean squared error over the squared range of the output, per sample; the worst output counts."""
    return _squared(teacher, changed, {name: value**2 for name, value in scale.range.items()}, worst=True)


def agreement(teacher: Outputs, changed: Outputs) -> float:
    """Share of samples whose largest class score stays the same."""
    (name,) = [key for key, value in teacher.items() if np.issubdtype(value.dtype, np.floating)]
    return float(np.mean(teacher[name].argmax(axis=-1) == changed[name].argmax(axis=-1)))


def _floats(outputs: Outputs) -> dict[str, NDArray[np.generic]]:
    return {name: value for name, value in outputs.items() if np.issubdtype(value.dtype, np.floating)}


def _difference(teacher: NDArray[np.generic], changed: NDArray[np.generic]) -> NDArray[np.float64]:
    """[samples, elements]."""
    difference = np.asarray(changed, np.float64) - np.asarray(teacher, np.float64)
    # Equal infinities (masked scores) differ by nan; they are equal.
    difference = np.where(np.asarray(teacher) == np.asarray(changed), 0.0, difference)
    return difference.reshape(len(difference), -1) if difference.ndim else difference.reshape(1, 1)


def _squared(teacher: Outputs, changed: Outputs, divisor: Mapping[str, float], *, worst: bool = False) -> Losses:
    parts = []
    for name, value in divisor.items():
        rows = _difference(teacher[name], changed[name])
        parts.append((rows**2).mean(axis=1) / value if rows.size else np.zeros(len(rows)))
    if not parts:
        raise UsageError("the model has no float output to compare", hint=_NO_FLOAT)
    samples = max(len(part) for part in parts)
    # An output without a sample axis stands for every sample.
    stacked = np.stack([part if len(part) == samples else np.full(samples, part.mean()) for part in parts])
    result: Losses = stacked.max(axis=0) if worst else stacked.sum(axis=0)
    return result


def _identity(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return z


def _log_softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    z = z - z.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return result


def _log_clipped(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of probabilities; below 1e-12 a float32 softmax has no digits left."""
    result: NDArray[np.float64] = np.log(np.clip(p, 1e-12, None))
    return result
