"""The error table against the truth: a handful of random plans, measured whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.ranking import correlation_interval, rank_correlation
from lcpaq_onnx.runtime.calibration import CalibrationData, Feed, feed_digest, joined_feed, stacks
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.runtime.whole_run import WholeJob, run_whole
from lcpaq_onnx.tables import Audit, ErrorTable

from .batch_size import BatchSize
from .graph_structure import GraphStructure
from .prober import Prober
from .rounded_weight import RoundedWeight, rounding_of
from .rounding_errors import WeightEntry
from .teacher import teacher_of

__all__ = ["AUDITED_PLANS", "RandomPlans", "audit"]

AUDITED_PLANS = 8
"""A whole run costs as much as two probes."""

Widths = Mapping[str, int]


@dataclass(frozen=True)
class RandomPlans(Analysis[tuple[tuple[Widths, float], ...]]):
    """``plans`` plans, each layer's stored width drawn from those it has among ``entries``, with the loss of the whole
    model whose weights are rounded so. Layers without an entry and activations stay float. Measured on ``samples``
    calibration samples behind the first ``samples``, which the error table has seen; on those where there are no more.
    """

    name: ClassVar[str] = "random-plans"
    entries: frozenset[WeightEntry] = frozenset()
    samples: int = 64
    plans: int = AUDITED_PLANS

    def run(self, graph: Graph, analyses: AnalysisManager) -> tuple[tuple[Widths, float], ...]:
        drawn = self._draw(analyses)
        feeds = self._unseen(analyses.inputs.samples())
        digest = hashlib.sha256()
        for feed in feeds:
            feed_digest(digest, feed)
        found = Prober(graph, analyses, self.samples).remembered(
            f"audit of {drawn} on {digest.hexdigest()}", lambda: {"loss": self._losses(graph, analyses, feeds, drawn)}
        )
        return tuple(zip(drawn, found["loss"].tolist(), strict=True))

    def _unseen(self, data: CalibrationData) -> list[Feed]:
        behind = list(islice(data.take(2 * self.samples), self.samples, None))
        return behind or list(data.take(self.samples))

    def _draw(self, analyses: AnalysisManager) -> list[dict[str, int]]:
        random = np.random.default_rng(analyses.inputs.seed)
        layers = analyses.get(GraphStructure).layers
        # Layers that share a weight share its width.
        widths: dict[str, set[int]] = {}
        for layer in layers:
            own = {bits for name, bits in self.entries if name == layer.name}
            widths[layer.weight] = widths.get(layer.weight, own) & own
        drawn = []
        for _ in range(self.plans):
            of_weight = {weight: int(random.choice(sorted(own))) for weight, own in widths.items() if own}
            drawn.append({layer.name: of_weight[layer.weight] for layer in layers if layer.weight in of_weight})
        return drawn

    def _losses(
        self, graph: Graph, analyses: AnalysisManager, feeds: list[Feed], drawn: list[dict[str, int]]
    ) -> NDArray[np.float64]:
        resources, teacher = analyses.inputs.resources, teacher_of(analyses)
        model = to_proto(graph)
        whole = Session(model, resources.probe_options, base_dir=graph.base_dir)
        outputs = [spec.name for spec in whole.outputs if spec.is_tensor]
        batches = [joined_feed(stack) for stack in stacks(feeds, analyses.get(BatchSize))]
        answers = tuple((batch, whole.run(batch, outputs)) for batch in batches)
        layers = {layer.name: layer for layer in analyses.get(GraphStructure).layers}

        @cache  # plans of few widths share most of their layers
        def rounded(name: str, bits: int) -> NDArray[np.float32]:
            return analyses.get(RoundedWeight(name, bits, rounding_of(analyses, name, bits).method)).dequantized()

        def jobs() -> Iterator[WholeJob]:
            for plan in drawn:
                weights = {layers[name].weight: rounded(name, bits) for name, bits in plan.items()}
                yield WholeJob(model, graph.base_dir, weights, answers, teacher.loss, resources.probe_options)

        return np.array([loss for _, loss in resources.workers.each(run_whole, jobs())])


def audit(table: ErrorTable, plans: tuple[tuple[Widths, float], ...], samples: int) -> Audit | None:
    """What ``table`` predicts for ``plans`` beside what was measured; None where all are equal."""
    predicted = tuple(sum(table.layers[name][bits].loss for name, bits in plan.items()) for plan, _ in plans)
    measured = tuple(loss for _, loss in plans)
    correlation = rank_correlation(predicted, measured)
    if np.isnan(correlation):
        return None
    low, high = correlation_interval(correlation, len(plans))
    return Audit(predicted, measured, correlation, low, high, samples)
