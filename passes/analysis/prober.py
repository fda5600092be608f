"""Measuring what moving single tensors does to the output: answered from the store, else by suffix runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph, content_sha256
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.directions import BlockSigns, Direction, Signs
from lcpaq_onnx.numeric.losses import KullbackLeibler, SquaredError
from lcpaq_onnx.runtime.probe import ProbeResult, joined
from lcpaq_onnx.runtime.probe_batches import Chunk, ProbeBatches
from lcpaq_onnx.store import MemoryStore, Store, code_version, key_of

from .batch_size import BatchSize
from .probe_runs import ProbeRuns
from .teacher import teacher_of

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
        self._store = analyses.get(_Results())
        self._subject = analyses.inputs.resources.subject
        self._batch_size = analyses.get(BatchSize)
        self._common_key = key_of(
            code_version(),
            analyses.get(_ContentHash()),
            repr(teacher_of(analyses)),
            ",".join(analyses.inputs.resources.providers),
        )

    @property
    def samples(self) -> int:
        """How many calibration samples there are to probe with."""
        return self._batches.samples

    def measure(self, probes: Collection[Probe]) -> dict[Probe, ProbeResult]:
        """What each probe does. What the store knows is not measured again; each result is stored when it is there."""
        chunks, store = self._batches.chunks, self._store
        keys = {(probe, chunk): self._key(probe, chunk) for probe in probes for chunk in chunks}
        known = store.get_many(list(keys.values()))
        results = {pair: ProbeResult(**known[key]) for pair, key in keys.items() if key in known}
        # Together: what lacks the same chunks. Mostly all of it lacks all.
        missing: dict[tuple[Chunk, ...], dict[str, list[Direction]]] = {}
        for probe in dict.fromkeys(probes):
            if lacking := tuple(chunk for chunk in chunks if (probe, chunk) not in results):
                missing.setdefault(lacking, {}).setdefault(probe.start, []).append(probe.direction)
        for lacking, wanted in missing.items():
            for pair, result in self._run(lacking, wanted):
                store.put(keys[pair], vars(result), subject=self._subject, what="probe")
                results[pair] = result
        return {probe: joined([results[probe, chunk] for chunk in chunks]) for probe in probes}

    def remembered(self, question: str, answer: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """``answer()`` about the model and these samples, or what the store has for the same ``question``."""
        key = key_of(self._common_key, question, *(chunk.sha256 for chunk in self._batches.chunks))
        found = self._store.get(key)
        if found is None:
            found = answer()
            self._store.put(key, found, subject=self._subject, what="audit")
        return found

    def _run(
        self, chunks: Sequence[Chunk], wanted: Mapping[str, Sequence[Direction]]
    ) -> Iterator[tuple[tuple[Probe, Chunk], ProbeResult]]:
        batches = {chunk: self._batches.of(chunk) for chunk in chunks}
        runs = ProbeRuns(self._graph, self._analyses, wanted)
        with self._analyses.inputs.progress.track("probing", len(wanted)) as advance:
            for start, found in runs.over([batch for chunk in chunks for batch in batches[chunk]]):
                for direction, parts in zip(wanted[start], found, strict=True):
                    of_batches = iter(parts)
                    for chunk in chunks:
                        own = list(islice(of_batches, len(batches[chunk])))
                        yield (Probe(start, direction), chunk), joined(own)
                advance(1)

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
class _Results(Analysis[Store]):
    """Where results are kept: in the store; those of a function of the user's, which nothing tells from another (its
    address may come again), only as long as this manager.
    """

    name: ClassVar[str] = "results"

    def run(self, graph: Graph, analyses: AnalysisManager) -> Store:
        is_known = isinstance(teacher_of(analyses).loss, KullbackLeibler | SquaredError)
        return analyses.inputs.resources.store if is_known else MemoryStore()


@dataclass(frozen=True)
class _ContentHash(Analysis[str]):
    name: ClassVar[str] = "content-hash"

    def run(self, graph: Graph, analyses: AnalysisManager) -> str:
        return content_sha256(graph)
