"""The loss against the float model's own outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.losses import OutputScale, SquaredError, TeacherLoss, teacher_loss

from .calibration_run import CalibrationRun

__all__ = ["Teacher", "steady_teacher_of", "teacher_of"]


@dataclass(frozen=True)
class Teacher:
    """The loss, and what 1.0 relative error means."""

    loss: TeacherLoss
    scale: OutputScale


def teacher_of(analyses: AnalysisManager) -> Teacher:
    """The user's loss, or the one that fits the outputs."""
    statistics = analyses.get(CalibrationRun)
    chosen = analyses.inputs.loss
    if callable(chosen):
        return Teacher(chosen, statistics.output_scale)
    if chosen == "auto":
        return Teacher(statistics.loss, statistics.output_scale)
    return Teacher(teacher_loss(chosen, statistics.output_scale), statistics.output_scale)


def steady_teacher_of(analyses: AnalysisManager) -> Teacher:
    """As ``teacher_of``, scales to four digits. Further ones depend on how many samples run at once, and so on free
    memory: what is stored must be found again for the very same teacher.
    """
    teacher = teacher_of(analyses)
    scale = OutputScale(_rounded(teacher.scale.range), _rounded(teacher.scale.mean_square))
    loss = teacher.loss
    if isinstance(loss, SquaredError):
        loss = SquaredError(tuple(_rounded(dict(loss.mean_square)).items()))
    return Teacher(loss, scale)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}
