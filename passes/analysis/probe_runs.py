"""Suffix runs: every start's tensors are cached once per batch, and a probe runs only what follows.

A change of a layer's weights adds its response to the layer's output (linear in the weights), so weights stay constants
and sessions are built once per suffix. Where the cache of all starts does not fit in memory, they are taken in
segments, and the float model runs once for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.query import nodes_by_name, weight_values
from lcpaq_onnx.graph.subgraph import SuffixExtractor
from lcpaq_onnx.manager.analysis import AnalysisManager
from lcpaq_onnx.numeric.directions import BlockSigns, Direction, Quantizing, Rounding, Signs
from lcpaq_onnx.runtime.probe import LinearLayer, ProbeJob, ProbeResult, StartBatch, run_probes
from lcpaq_onnx.runtime.probe_batches import Batch
from lcpaq_onnx.runtime.session import Session

from .graph_structure import GraphStructure
from .recorded_tensors import RecordedTensors
from .rounded_weight import RoundedWeight
from .teacher import teacher_of

__all__ = ["ProbeRuns"]

_SAME = 1e-3
_FLOAT_BYTES = 4


class ProbeRuns:
    """Runs of ``wanted``: start → directions. Directions of weights need a layer's raw output as start."""

    def __init__(self, graph: Graph, analyses: AnalysisManager, wanted: Mapping[str, Sequence[Direction]]) -> None:
        self._graph, self._analyses = graph, analyses
        self._wanted = wanted
        self._teacher = teacher_of(analyses)
        self._resources = analyses.inputs.resources
        self._recorded = analyses.get(RecordedTensors)
        self._nodes = nodes_by_name(graph)
        self._layer_at = {layer.raw_output: layer for layer in analyses.get(GraphStructure).layers}
        self._extractor = SuffixExtractor(graph, self._recorded)
        # Sequences and maps have no loss.
        self._outputs = [v.name for v in self._extractor.model.graph.output if v.name in self._recorded]
        self._fed = {value.name for value in self._extractor.model.graph.input}
        self._cuts = {start: self._extractor.cut(start, self._outputs) for start in wanted}
        self._reads = {start: frozenset(self._tensors_of(start)) for start in wanted}

    def over(self, batches: Sequence[Batch]) -> Iterator[tuple[str, tuple[tuple[ProbeResult, ...], ...]]]:
        """Each start; for each of its directions a result on each of ``batches``."""
        samples = sum(batch.samples for batch in batches)
        for segment in self._segments(samples):
            needed = sorted(frozenset[str]().union(*(self._reads[start] for start in segment)))
            session = Session(
                self._extractor.prefix([n for n in dict.fromkeys((*self._outputs, *needed)) if n not in self._fed]),
                self._resources.cache_options,
                base_dir=self._graph.base_dir,
            )
            by_sample = self._by_sample(session, batches[0], segment)
            parts: dict[str, list[tuple[tuple[ProbeResult, ...], ...]]] = {start: [] for start in segment}
            rounds = list(self._rounds(batches, needed))
            for group in rounds:
                cached = [self._cached(session, batch, needed) for batch in group]
                jobs = (self._job(start, cached, by_sample) for start in segment)
                for job, found in self._resources.workers.each(run_probes, jobs):
                    parts[job.suffix.start].append(found)
                    if len(parts[job.suffix.start]) == len(rounds):
                        by_round = parts.pop(job.suffix.start)
                        yield job.suffix.start, tuple(tuple(chain(*r)) for r in zip(*by_round, strict=True))

    # ---- memory -----------------------------------------------------------------------------------------------------
    def _segments(self, samples: int) -> Iterator[list[str]]:
        """Starts in graph order, as many at once as have room for what they read on all samples."""
        order = {name: index for index, name in enumerate(self._recorded)}
        segment: list[str] = []
        reads: frozenset[str] = frozenset(self._outputs)
        for start in sorted(self._wanted, key=lambda name: order[name]):
            grown = reads | self._reads[start]
            if segment and samples * self._sample_bytes(grown) > self._resources.cache_bytes:
                yield segment
                segment, grown = [], self._reads[start].union(self._outputs)
            segment.append(start)
            reads = grown
        if segment:
            yield segment

    def _rounds(self, batches: Sequence[Batch], names: Sequence[str]) -> Iterator[list[Batch]]:
        """Batches together whose cache fits in memory; one at least. More than one round only where a single start
        reads too much.
        """
        each = self._sample_bytes({*names, *self._outputs})
        group: list[Batch] = []
        for batch in batches:
            if group and each * (sum(b.samples for b in group) + batch.samples) > self._resources.cache_bytes:
                yield group
                group = []
            group.append(batch)
        yield group

    def _sample_bytes(self, names: frozenset[str] | set[str]) -> int:
        return _FLOAT_BYTES * sum(self._recorded[name].elements for name in names if name in self._recorded)

    # ---- the float model --------------------------------------------------------------------------------------------
    def _cached(self, session: Session, batch: Batch, names: Sequence[str]) -> StartBatch:
        values = session.run(batch.feed) if session.outputs else {}
        tensors = {name: values[name] if name in values else batch.feed[name] for name in names}
        outputs = {name: values[name] if name in values else batch.feed[name] for name in self._outputs}
        return StartBatch(batch.first, batch.samples, tensors, outputs)

    def _by_sample(self, session: Session, batch: Batch, segment: Sequence[str]) -> frozenset[str]:
        """Inputs of randomly moved layers whose rows (axis 0) stand sample by sample in a batch. Tried, not guessed:
        not so behind a transposition, and a layer behind a Reshape sees several rows for each sample.
        """
        is_random = {start for start in segment for d in self._wanted[start] if isinstance(d, Signs | BlockSigns)}
        names = [self._layer_at[start].input for start in is_random]
        if batch.samples == 1 or not names:
            return frozenset()
        together = self._cached(session, batch, names)
        first = Batch(batch.first, 1, {name: value[:1] for name, value in batch.feed.items()})
        alone = self._cached(session, first, names)
        return frozenset(n for n in names if _starts_with(together.floats(n), alone.floats(n), batch.samples))

    # ---- jobs -------------------------------------------------------------------------------------------------------
    def _tensors_of(self, start: str) -> Iterator[str]:
        """What jobs of ``start`` read of the float model."""
        yield from (start, *self._cuts[start].live)
        for direction in self._wanted[start]:
            yield direction.tensor if isinstance(direction, Quantizing) else self._layer_at[start].input

    def _job(self, start: str, batches: Sequence[StartBatch], by_sample: frozenset[str]) -> ProbeJob:
        return ProbeJob(
            suffix=self._extractor.suffix(self._cuts[start]),
            base_dir=self._graph.base_dir,
            layer=self._linear_layer(start, by_sample),
            directions=tuple(self._wanted[start]),
            batches=tuple(batch.only(self._reads[start]) for batch in batches),
            loss=self._teacher.loss,
            scale=self._teacher.scale,
            options=self._resources.probe_options,
        )

    def _linear_layer(self, start: str, by_sample: frozenset[str]) -> LinearLayer | None:
        layer = self._layer_at.get(start)
        if layer is None:
            return None
        node = self._nodes[layer.name]
        weight = weight_values(node, layer)
        return LinearLayer(
            name=layer.name,
            op=layer.op,
            attrs=dict(node.attrs),
            input=layer.input,
            weight=weight,
            channel_axis=layer.channel_axis,
            by_sample=layer.input in by_sample,
            errors={
                direction: self._analyses.get(RoundedWeight(layer.name, direction.bits, direction.method)).dequantized()
                - weight
                for direction in self._wanted[start]
                if isinstance(direction, Rounding)
            },
        )


def _starts_with(together: NDArray[np.float32], alone: NDArray[np.float32], samples: int) -> bool:
    """Whether a batch of ``samples`` begins with the rows of its first sample; kernels may sum in another order."""
    if alone.ndim == 0 or len(together) != samples * len(alone) or together.shape[1:] != alone.shape[1:]:
        return False
    slack = _SAME * float(np.abs(alone).max(initial=0.0))
    return bool(np.allclose(together[: len(alone)], alone, rtol=0.0, atol=slack))
