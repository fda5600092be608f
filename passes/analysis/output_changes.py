"""How single decisions move the output, sample by sample: what cross terms of several decisions are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.ranges import RangeMethod

from .activation_errors import ActivationErrors
from .prober import Prober
from .rounding_errors import RoundingErrors, WeightEntry

__all__ = ["OutputChange", "OutputChanges"]

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class OutputChange:
    """Embeddings [samples, k] in the loss' metric: of a layer at a stored width, of an activation group at 8 bits. k is
    0 for a loss of the user's own, which has no metric.
    """

    layers: dict[WeightEntry, Float]
    activations: dict[str, Float]


@dataclass(frozen=True)
class OutputChanges(Analysis[OutputChange]):
    """Of ``entries`` and all activation groups. Nothing new is run where their errors have been measured."""

    name: ClassVar[str] = "output-changes"
    entries: frozenset[WeightEntry] = frozenset()
    samples: int = 64
    method: RangeMethod = "mse"

    def run(self, graph: Graph, analyses: AnalysisManager) -> OutputChange:
        weights = RoundingErrors(self.entries, self.samples).probes(analyses)
        activations = ActivationErrors(self.samples, self.method).probes(graph, analyses)
        found = Prober(graph, analyses, self.samples).measure([*weights.values(), *activations.values()])
        return OutputChange(
            {entry: found[probe].embedding for entry, probe in weights.items()},
            {name: found[probe].embedding for name, probe in activations.items()},
        )
