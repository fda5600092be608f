"""One job of an audit: round many weights at once, run the whole model, compare the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from lcpaq_onnx.graph.rounded import with_weights
from lcpaq_onnx.numeric.losses import TeacherLoss
from lcpaq_onnx.runtime.calibration import Feed
from lcpaq_onnx.runtime.session import Session, SessionOptions

__all__ = ["WholeJob", "run_whole"]


@dataclass(frozen=True, eq=False)
class WholeJob:
    """``weights``: by initializer, what stands in for it. ``answers``: feeds with the float model's outputs."""

    model: onnx.ModelProto
    base_dir: Path | None
    weights: Mapping[str, NDArray[np.float32]]
    answers: tuple[tuple[Feed, Mapping[str, NDArray[np.generic]]], ...]
    loss: TeacherLoss
    options: SessionOptions


def run_whole(job: WholeJob) -> float:
    """Mean loss over all samples."""
    session = Session(with_weights(job.model, job.weights), job.options, base_dir=job.base_dir)
    losses = [job.loss(expected, session.run(feed, list(expected))) for feed, expected in job.answers]
    return float(np.concatenate(losses).mean())
