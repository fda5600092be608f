"""What analyses that change single tensors share: the samples, the cached batches, the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.subgraph import SuffixExtractor
from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.losses import OutputScale, TeacherLoss, teacher_loss
from lcpaq_onnx.runtime.suffix_runner import CachedBatch, OpenSuffix, SuffixRunner, in_rounds

from .batch_size import BatchSize
from .calibration_run import CalibrationRun
from .recorded_tensors import RecordedTensors

__all__ = ["Suffixes", "Teacher", "teacher_of"]

_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Teacher:
    """The loss against the float model's own outputs, and what 1.0 relative error means."""

    loss: TeacherLoss
    scale: OutputScale


def teacher_of(analyses: AnalysisManager) -> Teacher:
    """The user's loss, or the one that fits the outputs."""
    statistics = analyses.get(CalibrationRun)
    chosen = analyses.inputs.loss
    if callable(chosen):
        return Teacher(chosen, statistics.output_scale)
    name = statistics.loss if chosen == "auto" else chosen
    return Teacher(teacher_loss(name, statistics.output_scale), statistics.output_scale)


class Suffixes:
    """Suffix runs over the first ``samples`` calibration samples, in rounds whose caches fit in 1 GiB."""

    def __init__(
        self, graph: Graph, analyses: AnalysisManager, starts: Sequence[str], extra: Sequence[str], samples: int
    ) -> None:
        recorded = analyses.get(RecordedTensors)
        size = analyses.get(BatchSize)
        self.is_batched = size > 1
        self._runner = SuffixRunner(SuffixExtractor(graph, recorded), starts, extra, base_dir=graph.base_dir)
        data = analyses.inputs.samples().take(samples)
        sample_bytes = 4 * sum(recorded[name].elements for name in self._runner.cached_names if name in recorded)
        self._rounds = list(in_rounds(data.batches(size), sample_bytes, _CACHE_BYTES))

    @property
    def round_count(self) -> int:
        return len(self._rounds)

    def rounds(self) -> Iterator[list[CachedBatch]]:
        """Cached batches, one round after the other."""
        for feeds in self._rounds:
            yield [self._runner.cache(feed) for feed in feeds]

    def open(self, start: str, teacher: Teacher) -> OpenSuffix:
        """A session for what follows ``start``."""
        return self._runner.open(start, teacher.loss, teacher.scale)
