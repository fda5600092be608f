"""One pass of the float model over all calibration data: what activations and outputs look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.subgraph import with_outputs
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.losses import BuiltinLoss, OutputScale, OutputScaleStream, fitting_loss
from lcpaq_onnx.numeric.ranges import StreamingHistogram
from lcpaq_onnx.runtime.session import Session, SessionOptions

from .batch_size import BatchSize
from .graph_structure import GraphStructure

__all__ = ["CalibrationRun", "CalibrationStatistics"]

_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class CalibrationStatistics:
    """``histograms``: by activation group; groups that hold infinities or NaN, or that were empty in all samples (a
    cache with nothing in it), are absent: they have no range and stay in float. ``loss``: what fits the
    outputs, judged by those of ``answers``. ``answers``: the float model's outputs batch by batch, as long as they fit
    in memory.
    """

    histograms: dict[str, StreamingHistogram]
    loss: BuiltinLoss
    output_scale: OutputScale
    samples: int
    answers: tuple[dict[str, np.ndarray], ...]


@dataclass(frozen=True)
class CalibrationRun(Analysis[CalibrationStatistics]):
    """Histograms of the first tensor of each activation group (the others hold a subset of its values)."""

    name: ClassVar[str] = "calibration-run"

    def run(self, graph: Graph, analyses: AnalysisManager) -> CalibrationStatistics:
        model = to_proto(graph)
        structure = analyses.get(GraphStructure)
        fed = {value.name for value in model.graph.input}
        outputs = [value.name for value in model.graph.output]
        groups = [group.name for group in structure.candidates()]
        observed = with_outputs(model, [name for name in groups if name not in fed])
        options = SessionOptions(providers=analyses.inputs.resources.providers)
        session = Session(observed, options, base_dir=graph.base_dir)
        histograms = {name: StreamingHistogram() for name in groups}
        scale, samples = OutputScaleStream(), 0
        answers: list[dict[str, np.ndarray]] = []
        answer_bytes = 0
        batch_size = analyses.get(BatchSize)
        with analyses.inputs.progress.track("calibrating", analyses.inputs.sample_count()) as advance:
            for feed in analyses.inputs.samples().batches(batch_size):
                values = feed | session.run(feed, [spec.name for spec in session.outputs if spec.is_tensor])
                for name in list(histograms):
                    if np.isfinite([values[name].min(initial=0), values[name].max(initial=0)]).all():
                        histograms[name].update(values[name])
                    else:
                        del histograms[name]
                teacher = {name: values[name] for name in outputs if name in values}
                scale.update(teacher)
                answer_bytes += sum(value.nbytes for value in teacher.values())
                if answer_bytes <= _ANSWER_BYTES or not answers:
                    answers.append(teacher)
                batch = len(next(iter(feed.values()))) if batch_size > 1 else 1
                samples += batch
                advance(batch)
        histograms = {name: histogram for name, histogram in histograms.items() if histogram.counts.any()}
        output_scale = scale.result()
        loss = fitting_loss(answers, output_scale)
        return CalibrationStatistics(histograms, loss, output_scale, samples, tuple(answers))
