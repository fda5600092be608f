"""Measuring one prepared model on calibration data, as far as asked and no further."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.query import Structure, nodes_by_name
from lcpaq_onnx.graph.signatures import signature_of
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager, Progress
from lcpaq_onnx.numeric.columns import MOST_MOMENT_SAMPLES
from lcpaq_onnx.numeric.interactions import Interactions, steadied_interactions
from lcpaq_onnx.numeric.losses import LossName, TeacherLoss
from lcpaq_onnx.numeric.ranges import RangeMethod
from lcpaq_onnx.passes import (
    WEIGHT_BITS,
    ActivationRanges,
    BatchSize,
    CalibrationRun,
    CompensableLayers,
    ErrorTables,
    GraphStructure,
    HessianDiagonals,
    OutputChanges,
    RandomPlans,
    RangeCandidates,
    RecordedTensors,
    Reliability,
    WeightEntry,
    audit,
    every_entry,
    teacher_of,
)
from lcpaq_onnx.planning.formulate import activation_decision
from lcpaq_onnx.provenance import TOOL_VERSION
from lcpaq_onnx.runtime.calibration import CalibrationData, Feed
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.tables import ActivationRange, Audit, ErrorTable, HessianDiagonal, Measurements, RoundingMethod
from lcpaq_onnx.verification.measure import MeasuredError, Reference, measure_error

__all__ = ["Bench", "Estimator", "Migration", "Settings", "SourceModel"]

Outputs = dict[str, np.ndarray]

MEASUREMENTS_SCHEMA = 1

Estimator = Literal["auto", "hessian-diagonal", "rounding-error"]
Migration = Literal["auto", "never", "always"]

# Widths whose rounding errors can be told from none.
MEASURABLE_BITS = tuple(bits for bits in WEIGHT_BITS if bits <= 8)
# Root mean square error over the output's range up to which a model is worth comparing with others.
_USABLE_ERROR = 0.1
# Multiply-accumulates that a sensitivity analysis may take. Counted, not timed: the choice of samples must not depend
# on the machine.
_AFFORDABLE_MACS = 2.5e12
_SAMPLES = (16, 128)
_SAMPLE_STEPS = (32, 64)
# Runs of what follows a layer, for each sample: a probe of its Hessian, and rounding errors of the plan's width and of
# those around it.
_RUNS_PER_LAYER = 5


@dataclass(frozen=True)
class SourceModel:
    """The user's model by hash and size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Settings:
    """How to measure. ``estimator``: of what a stored width costs in error: ``hessian-diagonal`` (second order),
    ``rounding-error`` (every format measured) or ``auto`` (second order, and measured where the plan depends on it).
    ``range_method``: of activations, ``auto``: by the output's error where the histogram leaves a choice.
    ``sensitivity_samples``: samples of the sensitivity analysis (the first ones of the data), None: until the ranking
    of what was measured is settled, 16 to 128, fewer the larger the model; ``probes``: random directions per layer and
    sample. ``rounding``: of weights, ``auto``: compensated where the measured error is clearly lower than with nearest.
    ``migration``: moving range from activations to weights first (``planning.rewrites``), ``auto``: where the outcome,
    measured, is better; of ``quantize`` only.
    """

    loss: LossName | TeacherLoss = "auto"
    range_method: RangeMethod = "auto"
    estimator: Estimator = "auto"
    sensitivity_samples: int | None = None
    probes: int = 1
    seed: int = 0
    rounding: Literal["auto", RoundingMethod] = "auto"
    migration: Migration = "auto"


class Bench:
    """Analyses of a prepared float model; each runs when first asked for. ``rewrites``: what the prepared model was
    rewritten by to become ``graph``, as in ``Plan``.
    """

    def __init__(
        self,
        graph: Graph,
        source: SourceModel,
        data: CalibrationData,
        settings: Settings,
        progress: Progress,
        resources: Resources,
        rewrites: tuple[str, ...] = (),
    ) -> None:
        self.graph = graph
        self.rewrites = rewrites
        self.data = data
        self.settings = settings
        self._source = source
        self.inputs = AnalysisInputs(
            calibration=data,
            loss=settings.loss,
            seed=settings.seed,
            rounding="nearest" if settings.rounding == "nearest" else "compensated",
            progress=progress,
            resources=resources,
        )
        self._analyses = AnalysisManager(graph, self.inputs)

    def of_rewritten(self, graph: Graph, rewrites: tuple[str, ...]) -> Bench:
        """A bench for what ``rewrites`` made of this one's graph: the same model to the user, measured anew."""
        progress, resources = self.inputs.progress, self.inputs.resources
        return Bench(graph, self._source, self.data, self.settings, progress, resources, rewrites)

    @cached_property
    def decisive_sha256(self) -> str:
        """Of the samples that compensated rounding and rewrites look at: ``Plan.calibration_sha256``."""
        return self.data.take(MOST_MOMENT_SAMPLES).fingerprint()

    @property
    def structure(self) -> Structure:
        """Layers, activation groups and operators."""
        return self._analyses.get(GraphStructure)

    def ranges_only(self) -> Measurements:
        """Measurements without sensitivities: enough where nothing has to be traded against error."""
        candidates = self._analyses.get(RangeCandidates(self.settings.range_method))
        return self._measurements({name: found[0] for name, found in candidates.items()}, ErrorTable(), {})

    def with_errors(self, entries: Collection[WeightEntry], samples: int) -> Measurements:
        """Measurements with the error table, measured at ``entries`` and by second order elsewhere."""
        s = self.settings
        # Only second order alone needs to know how a layer's curvature is shared out over its channels.
        channel_probes = s.probes if s.estimator == "hessian-diagonal" else 0
        table = ErrorTables(frozenset(entries), samples, s.probes, channel_probes, s.range_method)
        errors = self._analyses.get(table)
        ranges = self._analyses.get(ActivationRanges(s.range_method, samples=samples))
        hessian = self._analyses.get(HessianDiagonals(samples, s.probes, channel_probes))
        return self._measurements(ranges, errors, hessian)

    def audit(self, errors: ErrorTable, entries: frozenset[WeightEntry], samples: int) -> Audit | None:
        """``errors`` against random plans, measured whole: layers in widths of measured ``entries`` (none: in any) that
        leave more than noise. None where there is nothing to choose.
        """
        candidates = entries or self.every_entry(None)
        usable = {bits for bits in {bits for _, bits in candidates} if _is_usable(errors, bits)}
        drawn = frozenset((name, bits) for name, bits in candidates if bits in usable)
        if len(usable) < 2:
            return None
        return audit(errors, self._analyses.get(RandomPlans(drawn, samples)), samples)

    def interactions(self, entries: Collection[WeightEntry], samples: int) -> Interactions | None:
        """Cross terms of measured ``entries`` and activation groups, by decision; None for a loss without a metric."""
        changes = self._analyses.get(OutputChanges(frozenset(entries), samples, self.settings.range_method))
        embeddings = {(name, f"w{bits}"): rows for (name, bits), rows in changes.layers.items()}
        embeddings |= {(activation_decision(name), "a8"): rows for name, rows in changes.activations.items()}
        usable = {entry: rows for entry, rows in embeddings.items() if rows.shape[1] and np.isfinite(rows).all()}
        return steadied_interactions(usable) if usable else None

    def reliability(self, entries: Collection[WeightEntry], samples: int) -> float:
        """Of the ranking that ``samples`` samples give of measured ``entries``, from 0 to 1."""
        return self._analyses.get(Reliability(frozenset(entries), samples))

    def every_entry(self, weight_bits: Collection[int] | None) -> frozenset[WeightEntry]:
        """All layers at all of ``weight_bits`` (None: all widths) that can be measured."""
        bits = tuple(b for b in MEASURABLE_BITS if weight_bits is None or b in weight_bits)
        return every_entry(self._analyses, bits)

    def weights_of_layers(self) -> dict[str, int]:
        """Number of weights of each layer."""
        return {layer.name: math.prod(layer.weight_shape) for layer in self.structure.layers}

    def error_of(self, quantized: Graph) -> MeasuredError:
        """Error of an emitted model over all calibration data."""
        session = Session(to_proto(quantized), base_dir=quantized.base_dir)
        return measure_error(session, self.answers(), self.reference)

    def sample_counts(self) -> tuple[int, ...]:
        """Numbers of sensitivity samples to try, fewest first."""
        if self.settings.sensitivity_samples is not None:
            return (self.settings.sensitivity_samples,)
        affordable = self._affordable_samples()
        # The data may end before; where only a reading tells, the analysis finds out.
        most = min(affordable, self.data.sample_count or affordable)
        return (*(count for count in _SAMPLE_STEPS if count < most), most)

    def _affordable_samples(self) -> int:
        """Each layer runs about half the model for each of its changes."""
        structure = self.structure
        shapes = {name: tensor.shape for name, tensor in self._analyses.get(RecordedTensors).items()}
        nodes = nodes_by_name(self.graph)
        macs = sum(signature_of(nodes[layer.name], shapes).macs for layer in structure.layers)
        runs = _RUNS_PER_LAYER * len(structure.layers) + len(structure.groups)
        least, most = _SAMPLES
        return int(np.clip(_AFFORDABLE_MACS / max(1, macs * runs / 2), least, most))

    @property
    def reference(self) -> Reference:
        """The float model's loss and output scale."""
        teacher = teacher_of(self._analyses)
        return Reference(teacher.loss, teacher.scale, decides=self._analyses.get(CalibrationRun).loss.decides)

    @property
    def loss_name(self) -> str:
        """The loss in use; ``user`` for a callable."""
        chosen = self.settings.loss
        if callable(chosen):
            return "user"
        return str(self._analyses.get(CalibrationRun).loss) if chosen == "auto" else chosen

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

    def _measurements(
        self, ranges: dict[str, ActivationRange], errors: ErrorTable, hessian: dict[str, HessianDiagonal]
    ) -> Measurements:
        return Measurements(
            schema=MEASUREMENTS_SCHEMA,
            tool_version=TOOL_VERSION,
            source_sha256=self._source.sha256,
            source_size_bytes=self._source.size_bytes,
            calibration=self.data.description,
            loss=self.loss_name,
            tensors=self._analyses.get(RecordedTensors),
            ranges=ranges,
            hessian=hessian,
            errors=errors,
            compensable=None if self.settings.rounding == "nearest" else self._analyses.get(CompensableLayers()),
        )


def _is_usable(errors: ErrorTable, bits: int) -> bool:
    """Whether all layers at ``bits`` together leave more than noise."""
    return sum(entries[bits].squared_error for entries in errors.layers.values()) <= _USABLE_ERROR**2
