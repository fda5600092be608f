"""What analyses that change single tensors share: the samples, the cached batches, the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.subgraph import SuffixExtractor
from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.losses import OutputScale, TeacherLoss, teacher_loss
from lcpaq_onnx.runtime.calibration import Feed
from lcpaq_onnx.runtime.suffix_runner import CachedBatch, OpenSuffix, SuffixRunner, in_rounds

from .batch_size import BatchSize
from .calibration_run import CalibrationRun
from .recorded_tensors import RecordedTensors

__all__ = ["Suffixes", "Teacher", "teacher_of"]

_CACHE_BYTES = 1 << 30
_SAME = 1e-3


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

    def by_sample(self, names: Sequence[str]) -> frozenset[str]:
        """Those of the cached tensors ``names`` whose rows (axis 0) stand sample by sample in a batch. Tried, not
        guessed: not so behind a transposition, and a layer behind a Reshape sees several rows for each sample.
        """
        if not self.is_batched:
            return frozenset()
        feed = self._rounds[0][0]
        samples = _sample_count(feed)
        together = self._runner.cache(feed)
        alone = self._runner.cache({name: value[:1] for name, value in feed.items()})
        return frozenset(name for name in names if _starts_with(together.floats(name), alone.floats(name), samples))

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


def _sample_count(feed: Feed) -> int:
    return len(next(iter(feed.values())))


def _starts_with(together: NDArray[np.float32], alone: NDArray[np.float32], samples: int) -> bool:
    """Whether a batch of ``samples`` begins with the rows of its first sample; kernels may sum in another order."""
    if alone.ndim == 0 or len(together) != samples * len(alone) or together.shape[1:] != alone.shape[1:]:
        return False
    slack = _SAME * float(np.abs(alone).max(initial=0.0))
    return bool(np.allclose(together[: len(alone)], alone, rtol=0.0, atol=slack))
