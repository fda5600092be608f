"""Measuring one prepared model on calibration data, as far as asked and no further."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.query import nodes_by_name
from lcpaq_onnx.graph.signatures import signature_of
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager, Progress
from lcpaq_onnx.numeric.losses import LossName, TeacherLoss
from lcpaq_onnx.numeric.ranges import RangeMethod
from lcpaq_onnx.passes import (
    ActivationRanges,
    BatchSize,
    CalibrationRun,
    ErrorTables,
    GraphStructure,
    HessianDiagonals,
    RecordedTensors,
    teacher_of,
)
from lcpaq_onnx.provenance import TOOL_VERSION
from lcpaq_onnx.runtime.calibration import CalibrationData, Feed
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.tables import ErrorTable, HessianDiagonal, Measurements
from lcpaq_onnx.verification.measure import MeasuredError, Reference, measure_error

__all__ = ["Bench", "Settings", "SourceModel"]

Outputs = dict[str, np.ndarray]

MEASUREMENTS_SCHEMA = 1

# Widths at which rounding is too coarse for second order.
_MEASURED_BITS = (2, 4)
# Multiply-accumulates that a sensitivity analysis may take. Counted, not timed: the choice of samples must not depend
# on the machine.
_AFFORDABLE_MACS = 2.5e12
_SAMPLES = (16, 80)


@dataclass(frozen=True)
class SourceModel:
    """The user's model by hash and size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Settings:
    """How to measure. ``sensitivity_samples``: samples of the sensitivity analysis (the first ones of the data), None:
    16 to 80, fewer the larger the model; ``probes``: random directions per layer and sample.
    """

    loss: LossName | TeacherLoss = "auto"
    range_method: RangeMethod = "mse"
    sensitivity_samples: int | None = None
    probes: int = 1
    seed: int = 0


class Bench:
    """Analyses of a prepared float model; each runs when first asked for."""

    def __init__(
        self, graph: Graph, source: SourceModel, data: CalibrationData, settings: Settings, progress: Progress
    ) -> None:
        self.graph = graph
        self.data = data
        self._source = source
        self._settings = settings
        inputs = AnalysisInputs(calibration=data, loss=settings.loss, seed=settings.seed, progress=progress)
        self._analyses = AnalysisManager(graph, inputs)

    def ranges_only(self) -> Measurements:
        """Measurements without sensitivities: enough where nothing has to be traded against error."""
        return self._measurements(ErrorTable(), {})

    def everything(self, weight_bits: Collection[int] | None = None) -> Measurements:
        """Measurements with the error table; exact at the low ones of ``weight_bits`` (None: all)."""
        s = self._settings
        samples = s.sensitivity_samples or self._affordable_samples()
        low = weight_bits is None or min(weight_bits, default=8) <= max(_MEASURED_BITS)
        measured = _MEASURED_BITS if low else ()
        table = ErrorTables(measured=measured, samples=samples, probes=s.probes, method=s.range_method)
        errors = self._analyses.get(table)
        return self._measurements(errors, self._analyses.get(HessianDiagonals(max(1, samples // 2), s.probes)))

    def error_of(self, quantized: Graph) -> MeasuredError:
        """Error of an emitted model over all calibration data."""
        session = Session(to_proto(quantized), base_dir=quantized.base_dir)
        return measure_error(session, self.answers(), self.reference)

    def _affordable_samples(self) -> int:
        """Samples of the sensitivity analysis: each layer runs about half the model for each of its changes."""
        structure = self._analyses.get(GraphStructure)
        shapes = {name: tensor.shape for name, tensor in self._analyses.get(RecordedTensors).items()}
        nodes = nodes_by_name(self.graph)
        macs = sum(signature_of(nodes[layer.name], shapes).macs for layer in structure.layers)
        runs = len(structure.layers) * (len(_MEASURED_BITS) + 2) + len(structure.groups)
        least, most = _SAMPLES
        return int(np.clip(_AFFORDABLE_MACS / max(1, macs * runs / 2), least, most))

    @property
    def reference(self) -> Reference:
        """The float model's loss and output scale."""
        teacher = teacher_of(self._analyses)
        return Reference(teacher.loss, teacher.scale, decides=self.loss_name.startswith("kl-"))

    @property
    def loss_name(self) -> str:
        """The loss in use; ``user`` for a callable."""
        chosen = self._settings.loss
        if callable(chosen):
            return "user"
        return self._analyses.get(CalibrationRun).loss if chosen == "auto" else chosen

    def answers(self) -> Iterator[tuple[Feed, Outputs]]:
        """Feeds with the float model's outputs: kept ones as long as they reach, then run again."""
        kept = self._analyses.get(CalibrationRun).answers
        session = None
        for index, feed in enumerate(self.data.batches(self._analyses.get(BatchSize))):
            if index < len(kept):
                yield feed, kept[index]
                continue
            session = session or Session(to_proto(self.graph), base_dir=self.graph.base_dir)
            yield feed, session.run(feed)

    def _measurements(self, errors: ErrorTable, hessian: dict[str, HessianDiagonal]) -> Measurements:
        return Measurements(
            schema=MEASUREMENTS_SCHEMA,
            tool_version=TOOL_VERSION,
            source_sha256=self._source.sha256,
            source_size_bytes=self._source.size_bytes,
            calibration=self.data.description,
            loss=self.loss_name,
            tensors=self._analyses.get(RecordedTensors),
            ranges=self._analyses.get(ActivationRanges(self._settings.range_method)),
            hessian=hessian,
            errors=errors,
        )
