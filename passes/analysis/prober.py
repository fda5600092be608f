"""Measuring what moving single tensors does to the output: answered from the store, else by suffix runs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph, content_sha256
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.directions import BlockSigns, Direction, Signs
from lcpaq_onnx.numeric.losses import KullbackLeibler, SquaredError
from lcpaq_onnx.runtime.probe import ProbeResult, joined
from lcpaq_onnx.runtime.probe_batches import Batch, Chunk, ProbeBatches
from lcpaq_onnx.store import code_version, key_of

from .batch_size import BatchSize
from .probe_runs import ProbeRuns
from .teacher import steady_teacher_of

__all__ = ["Probe", "Prober"]

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Probe:
    """Move the tensor ``start`` in ``direction``. Directions of weights need ``start`` to be a layer's raw output."""

    start: str
    direction: Direction


class Prober:
    """Probes of one graph over the first ``samples`` calibration samples."""

    def __init__(self, graph: Graph, analyses: AnalysisManager, samples: int) -> None:
        self._graph, self._analyses = graph, analyses
        self._batches = analyses.get(_Batches(samples))
        self._subject = analyses.inputs.resources.subject
        self._batch_size = analyses.get(BatchSize)
        self._common_key = key_of(
            code_version(),
            analyses.get(_ContentHash()),
            analyses.get(_TeacherKey()),
            ",".join(analyses.inputs.resources.providers),
        )

    @property
    def samples(self) -> int:
        """How many calibration samples there are to probe with."""
        return self._batches.samples

    def measure(self, probes: Collection[Probe]) -> dict[Probe, ProbeResult]:
        """What each probe does. What the store knows is not measured again; each result is stored when it is there."""
        by_chunk = [self._on_chunk(chunk, probes) for chunk in self._batches.chunks]
        return {probe: joined([results[probe] for results in by_chunk]) for probe in probes}

    def batches(self) -> Iterator[Batch]:
        """The samples."""
        return (batch for chunk in self._batches.chunks for batch in self._batches.of(chunk))

    def remembered(self, question: str, answer: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """``answer()`` about the model and these samples, or what the store has for the same ``question``."""
        store = self._analyses.inputs.resources.store
        key = key_of(self._common_key, question, *(chunk.sha256 for chunk in self._batches.chunks))
        found = store.get(key)
        if found is None:
            found = answer()
            store.put(key, found, subject=self._subject, what="audit")
        return found

    def _on_chunk(self, chunk: Chunk, probes: Collection[Probe]) -> dict[Probe, ProbeResult]:
        store = self._analyses.inputs.resources.store
        keys = {probe: self._key(probe, chunk) for probe in probes}
        known = store.get_many(list(keys.values()))
        results = {probe: ProbeResult(**known[key]) for probe, key in keys.items() if key in known}
        missing: dict[str, list[Direction]] = {}
        for probe in keys:
            if probe not in results:
                missing.setdefault(probe.start, []).append(probe.direction)
        if not missing:
            return results
        runs = ProbeRuns(self._graph, self._analyses, missing)
        with self._analyses.inputs.progress.track("probing", len(missing)) as advance:
            for start, found in runs.over(self._batches.of(chunk)):
                for direction, result in zip(missing[start], found, strict=True):
                    probe = Probe(start, direction)
                    results[probe] = result
                    store.put(keys[probe], vars(result), subject=self._subject, what="probe")
                advance(1)
        return results

    def _key(self, probe: Probe, chunk: Chunk) -> str:
        """Everything that a result depends on."""
        # Where rows of a sample cannot be told apart, the samples of a batch share a random draw.
        batch_size = self._batch_size if isinstance(probe.direction, Signs | BlockSigns) else 0
        return key_of(self._common_key, chunk.sha256, chunk.first, batch_size, probe.start, repr(probe.direction))


@dataclass(frozen=True)
class _Batches(Analysis[ProbeBatches]):
    name: ClassVar[str] = "probe-batches"
    samples: int = 64

    def run(self, graph: Graph, analyses: AnalysisManager) -> ProbeBatches:
        return ProbeBatches(analyses.inputs.samples(), self.samples, analyses.get(BatchSize))


@dataclass(frozen=True)
class _TeacherKey(Analysis[str]):
    """A function of the user's has nothing that tells it from another (its address may come again), so what is measured
    with it is found by this manager only.
    """

    name: ClassVar[str] = "teacher-key"

    def run(self, graph: Graph, analyses: AnalysisManager) -> str:
        teacher = steady_teacher_of(analyses)
        return repr(teacher) if isinstance(teacher.loss, KullbackLeibler | SquaredError) else uuid.uuid4().hex


@dataclass(frozen=True)
class _ContentHash(Analysis[str]):
    name: ClassVar[str] = "content-hash"

    def run(self, graph: Graph, analyses: AnalysisManager) -> str:
        return content_sha256(graph)
