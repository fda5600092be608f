"""What each decision costs on the target: exact bytes, latency, bit operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import TargetError
from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.graph.ops import has_integer_form
from lcpaq_onnx.graph.query import Layer, Structure, input_channels, nodes_by_name, weight_values
from lcpaq_onnx.graph.signatures import Shape, signature_of
from lcpaq_onnx.graph.size_model import SizeModel, StoredLayer
from lcpaq_onnx.manager.analysis import Analysis, AnalysisManager
from lcpaq_onnx.numeric.rounding import can_saturate, round_nearest
from lcpaq_onnx.provenance import model_metadata
from lcpaq_onnx.signature import OperatorSignature
from lcpaq_onnx.tables import Cost, CostTable
from lcpaq_onnx.targets.schema import EXECUTED_BITS
from lcpaq_onnx.targets.target import Target

from .block_layers import takes_blocks
from .graph_structure import GraphStructure
from .recorded_tensors import RecordedTensors

__all__ = ["CostTables", "SizeModels", "explicit_movers", "stored_layer"]


@dataclass(frozen=True)
class SizeModels(Analysis[SizeModel]):
    """Byte counts of the emitted file, by decision and in total."""

    name: ClassVar[str] = "size-model"

    def run(self, graph: Graph, analyses: AnalysisManager) -> SizeModel:
        structure = analyses.get(GraphStructure)
        explicit = explicit_movers(structure, analyses.target)
        return SizeModel(graph, structure, explicit, model_metadata(analyses.target.name, "0" * 64))


def explicit_movers(structure: Structure, target: Target) -> frozenset[str]:
    """Operators that are written on integers when their group is in 8 bits."""
    group_of = structure.group_of()
    return frozenset(
        operator.name
        for operator in structure.operators
        if operator.moves_data
        and target.moves_integers(operator.op, 8)
        and len({group_of[name] for name in (*operator.inputs, *operator.outputs)}) == 1
    )


def stored_layer(layer: Layer, format: LayerFormat, target: Target, storage: dict[str, str]) -> StoredLayer:
    """How ``layer`` stands in the file in ``format``."""
    if format.weight_bits is None:
        return StoredLayer()
    return StoredLayer(
        weight=target.weight_format(layer.op, format.weight_bits, layer.channel_axis, block=format.block),
        storage=storage[format.stored],
        with_scale_only=format.is_folded,
        integer_bias=layer.bias is not None and target.executed(layer.op, format).startswith("int"),
    )


@dataclass(frozen=True)
class CostTables(Analysis[CostTable]):
    """Costs of every legal format at the recorded shapes.

    Latency: the target's measured row for that very node, else its roofline. A layer's time covers its fused
    activation. A lookup takes as long in any format: scaling the rows it picks is microseconds (128 rows of 384: 19),
    and counted it would keep tables of megabytes in float wherever time comes first. Bit operations:
    multiply-accumulates × executed weight bits × executed activation bits (HAWQ-V3).
    """

    name: ClassVar[str] = "cost-table"
    weight_bits: tuple[int, ...] | None = None
    """Stored widths to count; None: all that the target has."""
    activation_bits: tuple[int, ...] | None = None
    """Activation widths to count, 32 for float; None: all that the target has."""
    opset: int | None = None
    """Whose storage to count; None: the graph's."""

    def run(self, graph: Graph, analyses: AnalysisManager) -> CostTable:
        target = analyses.target
        structure = analyses.get(GraphStructure)
        recorded = analyses.get(RecordedTensors)
        sizes = analyses.get(SizeModels)
        storage = _storage(target, self.opset or graph.opset)
        shapes = {name: tensor.shape for name, tensor in recorded.items()}
        nodes = nodes_by_name(graph)
        layers = {
            layer.name: self._layer(layer, nodes[layer.name], shapes, analyses, storage) for layer in structure.layers
        }
        operators = {
            operator.name: self._operator(nodes[operator.name], shapes, target) for operator in structure.operators
        }
        formats = {f"a{bits}": target.activation_format(bits) for bits in target.activations}
        widest = target.activation_format(max(target.activations))  # its zero points take the most bytes
        float_layers = [costs["f32"] for costs in layers.values()]
        return CostTable(
            layers=layers,
            activations={
                group.name: {text: Cost(size_bytes=sizes.group_bytes(group, f)) for text, f in formats.items()}
                for group in structure.groups
            },
            operators=operators,
            isolated={
                layer.name: Cost(size_bytes=sizes.isolated_bytes(layer.name, input_channels(layer, recorded), widest))
                for layer in structure.layers
                if not layer.is_lookup
            },
            unpack={
                bits: sizes.blob_bytes(bits)
                for bits in target.weights.stored_bits
                if storage.get(LayerFormat(bits).stored) == "packed-bytes"
            },
            storage=storage,
            fixed_size_bytes=sizes.fixed_bytes,
            reference=Cost(
                size_bytes=sizes.fixed_bytes + sum(cost.size_bytes for cost in float_layers),
                latency_us=sum(c.latency_us for c in float_layers)
                + sum(c["f32"].latency_us for c in operators.values()),
                bops=sum(cost.bops for cost in float_layers),
            ),
        )

    def _layer(
        self,
        layer: Layer,
        node: gs.Node,
        shapes: Mapping[str, Shape],
        analyses: AnalysisManager,
        storage: dict[str, str],
    ) -> dict[str, Cost]:
        target, sizes = analyses.target, analyses.get(SizeModels)
        signature = signature_of(node, shapes)
        costs = {}
        for format in target.layer_formats(layer.op):
            if not (format.is_float or format.stored in storage) or not self._counts(layer, format):
                continue
            if layer.has_other_readers and not (format.is_float or format.is_folded):
                continue
            rank = len(shapes[layer.raw_output])
            if format.block is not None and not takes_blocks(node, layer, format, rank, target):
                continue
            executed = target.executed(layer.op, format)
            if executed.startswith("int") and not has_integer_form(node.op, node.attrs):
                continue
            if executed == "int8" and target.weights.saturating_pairs and self._saturates(layer, node, format, target):
                continue
            latency = target.latency(signature, executed)
            bits = EXECUTED_BITS[executed]
            size = sizes.layer_bytes(layer.name, stored_layer(layer, format, target, storage))
            costs[str(format)] = Cost(size, latency.latency_us, float(signature.macs * bits * bits), latency.source)
        return costs

    def _counts(self, layer: Layer, format: LayerFormat) -> bool:
        if format.is_float:
            return True
        weight_fits = self.weight_bits is None or format.weight_bits in self.weight_bits
        if layer.is_lookup:
            return weight_fits
        return weight_fits and (self.activation_bits is None or (format.activation_bits or 32) in self.activation_bits)

    def _saturates(self, layer: Layer, node: gs.Node, format: LayerFormat, target: Target) -> bool:
        """Whether the layer's integers in ``format`` can overflow the kernel's 16-bit sums; 7 bits never can."""
        assert format.weight_bits is not None
        if format.weight_bits <= 7:
            return False
        weight_format = target.weight_format(layer.op, format.weight_bits, layer.channel_axis)
        return can_saturate(round_nearest(weight_values(node, layer), weight_format))

    def _operator(self, node: gs.Node, shapes: Mapping[str, Shape], target: Target) -> dict[str, Cost]:
        """Time in float, and in integer where the target has a kernel. Bodies of control flow are not counted."""
        if any(
            tensor.name not in shapes
            for tensor in (*node.inputs, *node.outputs)
            if isinstance(tensor, gs.Variable) and tensor.name
        ):
            return {"f32": Cost()}
        signature = signature_of(node, shapes)
        costs = {"f32": _time(target, signature, "f32")}
        if target.runs_integer(node.op, 8, node.attrs) or target.moves_integers(node.op, 8):
            costs["int8"] = _time(target, signature, "int8")
        return costs


def _time(target: Target, signature: OperatorSignature, executed: str) -> Cost:
    latency = target.latency(signature, executed)
    return Cost(latency_us=latency.latency_us, source=latency.source)


def _storage(target: Target, opset: int) -> dict[str, str]:
    """What can be stored at this opset → expression."""
    rules: dict[str, str] = {}
    for format in target.stored_formats:
        assert format.weight_bits is not None
        try:
            rule = target.storage_for(format.weight_bits, block=format.block, opset_max=opset)
        except TargetError:
            continue
        rules[format.stored] = rule.expression
    return rules
