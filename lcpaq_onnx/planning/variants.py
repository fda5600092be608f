"""A prepared model at each opset that a plan may need: what can be expressed there, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lcpaq_onnx.errors import PassError, TargetError
from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.opset import least_ir_version, same_nodes
from lcpaq_onnx.graph.query import Structure
from lcpaq_onnx.graph.size_model import SizeModel
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.passes import (
    CostTables,
    GraphStructure,
    MemoryTimeline,
    RecordedTensors,
    SizeModels,
    explicit_movers,
    raise_to,
)
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.tables import CostTable, LiveStep, RecordedTensor
from lcpaq_onnx.targets.target import Target

__all__ = ["Variant", "Variants"]

# Per-channel DequantizeLinear; below it there is no form that all runtimes take.
_LEAST_OPSET = 13


@dataclass(frozen=True, eq=False)
class Variant:
    """The model at one opset. Nothing here depends on errors."""

    opset: int
    ir_version: int
    structure: Structure
    costs: CostTable
    timeline: tuple[LiveStep, ...]
    sizes: SizeModel
    explicit: frozenset[str]


class Variants:
    """Made when asked for, kept. ``graph``: prepared, not changed."""

    def __init__(self, graph: Graph, tensors: Mapping[str, RecordedTensor], target: Target, allowed: Allowed) -> None:
        if graph.opset > target.runtime.opset_max:
            raise TargetError(
                f"the model needs opset {graph.opset}, target '{target.name}' takes at most {target.runtime.opset_max}",
                hint="export the model with a lower opset, or choose another target",
            )
        self._graph = graph
        self._tensors = tensors
        self._target = target
        self._allowed = allowed
        self._made: dict[int, Variant] = {}
        self._unchanged: tuple[Variant, AnalysisManager] | None = None

    def widest(self) -> Variant:
        """The lowest opset at which every allowed width has the storage that the target prefers; lower ones where the
        model cannot be raised that far.
        """
        wanted = {self._storage_opset(format) for format in self._stored_formats()} | {_LEAST_OPSET}
        wanted |= {21} if any(bits > 8 for bits in self._activation_widths()) else set()
        reasons = []
        for opset in sorted(wanted, reverse=True):
            try:
                return self.at(opset)
            except PassError as error:
                reasons.append(error)
        if self._graph.opset >= _LEAST_OPSET:
            return self.at(self._graph.opset)
        raise reasons[-1]

    def at(self, opset: int) -> Variant:
        """At ``opset``, or the model's own where that is higher."""
        opset = max(opset, self._graph.opset)
        if opset not in self._made:
            self._made[opset] = self._as_newer(opset) or self._raised(opset)
        return self._made[opset]

    def _as_newer(self, opset: int) -> Variant | None:
        """From that of a newer opset for which no node had to change: it is the same but for what can be stored."""
        if self._unchanged is None or self._unchanged[0].opset <= opset:
            return None
        newer, analyses = self._unchanged
        ir_version = max(self._graph.ir_version, least_ir_version(opset))
        return replace(newer, opset=opset, ir_version=ir_version, costs=analyses.get(self._cost_tables(opset)))

    def _raised(self, opset: int) -> Variant:
        graph = run_pipeline(raise_to(opset), PassContext.of(self._graph)).graph
        analyses = AnalysisManager(graph, AnalysisInputs(target=self._target))
        analyses.put(RecordedTensors(), dict(self._tensors))
        structure = analyses.get(GraphStructure)
        variant = Variant(
            opset=graph.opset,
            ir_version=graph.header.ir_version,
            structure=structure,
            costs=analyses.get(self._cost_tables()),
            timeline=analyses.get(MemoryTimeline),
            sizes=analyses.get(SizeModels),
            explicit=explicit_movers(structure, self._target),
        )
        if self._unchanged is None and same_nodes(graph, self._graph):
            self._unchanged = variant, analyses
        return variant

    def _cost_tables(self, opset: int | None = None) -> CostTables:
        return CostTables(self._widths(), self._allowed_activations(), opset)

    def least_opset(self, layers: Iterable[LayerFormat], activations: Iterable[str]) -> int:
        """The least that expresses layers and activation groups of these formats."""
        needed = {_LEAST_OPSET, self._graph.opset}
        needed |= {self._storage_opset(format) for format in layers if not format.is_float}
        needed |= {21 for text in activations if text == "a16"}
        return max(needed)

    def _storage_opset(self, format: LayerFormat) -> int:
        assert format.weight_bits is not None
        return self._target.storage_for(format.weight_bits, block=format.block).min_opset

    def _stored_formats(self) -> Iterable[LayerFormat]:
        """Allowed ones that some layer of the model could have."""
        widths = self._widths()
        found = (format for op in {node.op for node in self._graph.nodes} for format in self._target.layer_formats(op))
        return (format for format in found if format.weight_bits in widths)

    def _widths(self) -> tuple[int, ...]:
        stored = self._target.weights.stored_bits
        allowed = self._allowed.weight_bits
        return tuple(bits for bits in stored if allowed is None or bits in allowed)

    def _allowed_activations(self) -> tuple[int, ...] | None:
        allowed = self._allowed.activation_bits
        return None if allowed is None else tuple(sorted(allowed))

    def _activation_widths(self) -> tuple[int, ...]:
        allowed = self._allowed.activation_bits
        return tuple(bits for bits in self._target.activations if allowed is None or bits in allowed)
