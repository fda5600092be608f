"""The float model's own answers on calibration samples, for measuring other models against it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lcpaq_onnx.numeric.losses import LossName, OutputScaleStream, TeacherLoss, fitting_loss, teacher_loss
from lcpaq_onnx.runtime.calibration import CalibrationData, Feed
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.verification.measure import Reference

__all__ = ["Answers", "reference_of", "tensor_outputs"]

Outputs = dict[str, np.ndarray]

# Outputs kept from the first reading; above it they are computed again, so that memory does not grow.
_KEPT_BYTES = 64 << 20


def tensor_outputs(session: Session) -> list[str]:
    """Names of the outputs that are tensors; sequences and maps cannot be compared."""
    return [spec.name for spec in session.outputs if spec.is_tensor]


class Answers:
    """Batches with the float model's outputs for them, any number of times."""

    def __init__(self, session: Session, data: CalibrationData, batch_size: int) -> None:
        self._session, self._data, self._batch_size = session, data, batch_size
        self._names = tensor_outputs(session)
        self._kept: list[Outputs] = []
        self._kept_bytes = 0

    def __iter__(self) -> Iterator[tuple[Feed, Outputs]]:
        for index, feed in enumerate(self._data.batches(self._batch_size)):
            if index < len(self._kept):
                yield feed, self._kept[index]
                continue
            outputs = self._session.run(feed, self._names)
            size = sum(value.nbytes for value in outputs.values())
            if index == len(self._kept) and self._kept_bytes + size <= _KEPT_BYTES:
                self._kept.append(outputs)
                self._kept_bytes += size
            yield feed, outputs


def reference_of(answers: Answers, loss: LossName | TeacherLoss) -> tuple[Reference, str]:
    """How to compare with ``answers``, and the name of the loss (``user`` for a callable); reads all of them.

    Raises UsageError where ``loss`` has to be chosen and no output is float.
    """
    stream = OutputScaleStream()
    seen: list[Outputs] = []
    seen_bytes = 0
    for _, outputs in answers:
        stream.update(outputs)
        seen_bytes += sum(value.nbytes for value in outputs.values())
        if seen_bytes <= _KEPT_BYTES or not seen:
            seen.append(outputs)
    scale = stream.result()
    fitting = fitting_loss(seen, scale)
    if callable(loss):
        return Reference(loss, scale, decides=fitting.decides), "user"
    chosen = fitting if loss == "auto" else teacher_loss(loss, scale)
    return Reference(chosen, scale, decides=fitting.decides), str(chosen)
