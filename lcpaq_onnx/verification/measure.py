"""Measured error of an emitted model against the float one, on data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.numeric.losses import OutputScale, TeacherLoss, agreement, relative_squared_error
from lcpaq_onnx.runtime.calibration import Feed
from lcpaq_onnx.runtime.session import Session

__all__ = ["MeasuredError", "Reference", "measure_error"]

Outputs = dict[str, NDArray[np.generic]]

# Fewer samples tell nothing.
_JUDGED = 8


@dataclass(frozen=True)
class MeasuredError:
    """``losses`` of the samples, and means over them. ``relative_error``: root mean square error over the output's
    scale (its range). ``agreement``: share of decisions kept, None where outputs are not class scores.
    """

    losses: NDArray[np.float64] = field(compare=False, repr=False)
    relative_error: float
    agreement: float | None

    @property
    def samples(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def loss_stderr(self) -> float:
        return float(self.losses.std(ddof=1) / np.sqrt(self.samples)) if self.samples > 1 else 0.0

    def is_clearly_below(self, other: MeasuredError, first: int = 0) -> bool:
        """Whether the loss is lower than that of ``other``, on the same samples: by two standard errors of the mean
        difference, or, where a few samples make up mean and error, on more samples than chance explains.
        Judged from sample ``first`` on, if there are some.
        """
        gain = (other.losses - self.losses)[first if first + _JUDGED <= self.samples else 0 :]
        if len(gain) < 2 or not gain.mean() > 0:
            return False
        # Two standard deviations of a fair coin's heads.
        on_most = np.count_nonzero(gain > 0) > len(gain) / 2 + np.sqrt(len(gain))
        return bool(on_most or gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)))


@dataclass(frozen=True, eq=False)
class Reference:
    """The float model's answers and how to compare with them. ``decides``: outputs are class scores."""

    loss: TeacherLoss
    scale: OutputScale
    decides: bool


def measure_error(session: Session, pairs: Iterable[tuple[Feed, Outputs]], reference: Reference) -> MeasuredError:
    """Run ``session`` on the feeds of ``pairs`` and compare with the float outputs beside them."""
    losses, squared, kept, samples = [], [], 0.0, 0
    for feed, expected in pairs:
        outputs = session.run(feed, list(expected))
        loss = reference.loss(expected, outputs)
        losses.append(loss)
        squared.append(relative_squared_error(expected, outputs, reference.scale))
        samples += len(loss)
        if reference.decides:
            kept += agreement(expected, outputs) * len(loss)
    all_losses, all_squared = np.concatenate(losses), np.concatenate(squared)
    return MeasuredError(
        losses=all_losses,
        relative_error=float(np.sqrt(all_squared.mean())),
        agreement=kept / samples if reference.decides else None,
    )
