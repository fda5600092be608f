"""The loss against the float model's own outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.losses import OutputScale, SquaredError, TeacherLoss, teacher_loss

from .calibration_run import CalibrationRun

__all__ = ["Teacher", "teacher_of"]


@dataclass(frozen=True)
class Teacher:
    """The loss, and what 1.0 relative error means."""

    loss: TeacherLoss
    scale: OutputScale


def teacher_of(analyses: AnalysisManager) -> Teacher:
    """The user's loss, or the one that fits the outputs; scales to four digits. Further ones depend on how many samples
    run at once, and so on free memory: what is stored must be found again for the very same teacher.
    """
    statistics = analyses.get(CalibrationRun)
    scale = OutputScale(_rounded(statistics.output_scale.range), _rounded(statistics.output_scale.mean_square))
    chosen = analyses.inputs.loss
    if callable(chosen):
        return Teacher(chosen, scale)
    loss = statistics.loss if chosen == "auto" else teacher_loss(chosen, scale)
    # The one that fits was made before the scale was rounded.
    return Teacher(teacher_loss("squared-error", scale) if isinstance(loss, SquaredError) else loss, scale)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}
