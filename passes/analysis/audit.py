"""The error table against the truth: a handful of random plans, measured whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph, to_proto
from lcpaq_onnx.graph.query import nodes_by_name, weight_values
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.directions import Rounding
from lcpaq_onnx.numeric.ranking import correlation_interval, rank_correlation
from lcpaq_onnx.runtime.probe_batches import Batch
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.runtime.whole_run import WholeJob, run_whole
from lcpaq_onnx.tables import Audit

from .graph_structure import GraphStructure
from .prober import Prober
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
        prober = Prober(graph, analyses, 2 * self.samples)
        unseen = [batch for batch in prober.batches() if batch.first >= self.samples]
        batches = unseen or list(prober.batches())
        found = prober.remembered(f"audit {drawn}", lambda: {"loss": self._losses(graph, analyses, batches, drawn)})
        return tuple(zip(drawn, found["loss"].tolist(), strict=True))

    def _draw(self, analyses: AnalysisManager) -> list[dict[str, int]]:
        random = np.random.default_rng(analyses.inputs.seed)
        layers = analyses.get(GraphStructure).layers
        widths = {layer.name: sorted(bits for name, bits in self.entries if name == layer.name) for layer in layers}
        drawn = []
        for _ in range(self.plans):
            of_weight: dict[str, int] = {}
            # Layers that share a weight share its width.
            for layer in layers:
                if widths[layer.name] and layer.weight not in of_weight:
                    of_weight[layer.weight] = int(random.choice(widths[layer.name]))
            drawn.append({layer.name: of_weight[layer.weight] for layer in layers if layer.weight in of_weight})
        return drawn

    def _losses(
        self, graph: Graph, analyses: AnalysisManager, batches: list[Batch], drawn: list[dict[str, int]]
    ) -> NDArray[np.float64]:
        resources, teacher = analyses.inputs.resources, teacher_of(analyses)
        model = to_proto(graph)
        whole = Session(model, resources.probe_options, base_dir=graph.base_dir)
        answers = tuple((batch.feed, whole.run(batch.feed)) for batch in batches)
        layers = {layer.name: layer for layer in analyses.get(GraphStructure).layers}
        nodes = nodes_by_name(graph)

        @cache  # plans of few widths share most of their layers
        def rounded(name: str, bits: int) -> NDArray[np.float32]:
            weight = weight_values(nodes[name], layers[name])
            return weight + Rounding(bits).error(weight, layers[name].channel_axis)

        def jobs() -> Iterator[WholeJob]:
            for plan in drawn:
                weights = {layers[name].weight: rounded(name, bits) for name, bits in plan.items()}
                yield WholeJob(model, graph.base_dir, weights, answers, teacher.loss, resources.probe_options)

        return np.array([loss for _, loss in resources.workers.each(run_whole, jobs())])


def audit(predict: Callable[[Widths], float], plans: tuple[tuple[Widths, float], ...], samples: int) -> Audit | None:
    """What ``predict`` says of ``plans`` beside what was measured; None where all are equal."""
    predicted = tuple(predict(plan) for plan, _ in plans)
    measured = tuple(loss for _, loss in plans)
    correlation = rank_correlation(predicted, measured)
    if np.isnan(correlation):
        return None
    low, high = correlation_interval(correlation, len(plans))
    return Audit(predicted, measured, correlation, low, high, samples)
