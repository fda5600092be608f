"""What may be chosen for one model on one target: formats of layers and groups, and which operators decide."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.graph.query import Layer, Operator, Structure
from lcpaq_onnx.tables import CostTable, RecordedTensor
from lcpaq_onnx.targets.target import Quirk, Target

__all__ = ["Allowed", "Choices"]


@dataclass(frozen=True)
class Allowed:
    """Widths the user lets the planner choose from; None: whatever the target can. 32 stands for float: weight widths
    without it still leave a layer in float where activations may be float; a layer with no other legal format always
    may.
    """

    weight_bits: frozenset[int] | None = None
    activation_bits: frozenset[int] | None = None

    def permits(self, format: LayerFormat) -> bool:
        """Whether a layer may take ``format``."""
        activation_fits = self.activation_bits is None or (format.activation_bits or 32) in self.activation_bits
        return activation_fits and self.permits_weight(format)

    def permits_weight(self, format: LayerFormat) -> bool:
        """Whether a layer's weights may be stored as ``format`` says."""
        return self.weight_bits is None or format.is_float or format.weight_bits in self.weight_bits


@dataclass(frozen=True)
class Choices:
    """Legal formats. ``quantizable``: groups with a usable range."""

    structure: Structure
    tensors: Mapping[str, RecordedTensor]
    costs: CostTable
    target: Target
    allowed: Allowed
    quantizable: Collection[str]

    @cached_property
    def group_of(self) -> dict[str, str]:
        """Tensor → group."""
        return self.structure.group_of()

    def group_formats(self, group: str) -> tuple[str, ...]:
        """Integer formats a group may take; empty where it must stay float."""
        if group not in self.quantizable or group not in self._useful:
            return ()
        bits = sorted(self.target.activations, reverse=True)
        allowed = self.allowed.activation_bits
        return tuple(f"a{b}" for b in bits if allowed is None or b in allowed)

    def layer_formats(self, layer: Layer) -> tuple[LayerFormat, ...]:
        """Formats a layer may take, widest first; integer ones only between groups that can be quantized."""
        return self._layer_formats[layer.name]

    @cached_property
    def _layer_formats(self) -> dict[str, tuple[LayerFormat, ...]]:
        return {layer.name: tuple(self._legal_formats(layer)) or (LayerFormat(),) for layer in self.structure.layers}

    def _legal_formats(self, layer: Layer) -> Iterator[LayerFormat]:
        for format in self.target.layer_formats(layer.op):
            if str(format) not in self.costs.layers[layer.name]:
                continue
            if self._permits(layer, format) and self._operands_fit(layer, format):
                yield format

    def _permits(self, layer: Layer, format: LayerFormat) -> bool:
        """A lookup reads no activation, so limits on these leave it free."""
        if layer.is_lookup and not format.is_float:
            return self.allowed.permits_weight(format)
        return self.allowed.permits(format)

    @cached_property
    def _useful(self) -> frozenset[str]:
        """Groups that some layer or operator could read or write as integers."""
        ends = {name for layer in self.structure.layers for name in (layer.input, layer.output)}
        for operator in self.structure.operators:
            if "int8" in self.costs.operators[operator.name] and not operator.moves_data:
                ends.update((*operator.inputs, *operator.outputs))
        return frozenset(self.group_of[name] for name in ends if name in self.group_of)

    @cached_property
    def _deciding(self) -> dict[str, Operator]:
        """Operators that run in integer exactly when all their tensors do."""
        return {
            operator.name: operator
            for operator in self.structure.operators
            if "int8" in self.costs.operators[operator.name]
            and not operator.has_float_constant
            and not self._is_mover(operator)
            and operator.inputs
            and operator.outputs
            and all("a8" in self.group_formats(self.group_of[t]) for t in (*operator.inputs, *operator.outputs))
        }

    def _is_mover(self, operator: Operator) -> bool:
        """Keeps values and can do so on integers: it follows its group and needs no decision."""
        same_group = len({self.group_of[t] for t in (*operator.inputs, *operator.outputs)}) == 1
        return operator.moves_data and same_group and "int8" in self.costs.operators[operator.name]

    def _operands_fit(self, layer: Layer, format: LayerFormat) -> bool:
        if format.activation_bits is None:
            return True
        wanted = f"a{format.activation_bits}"
        return all(wanted in self.group_formats(self.group_of.get(t, "")) for t in self._operands(layer, format))

    def _operands(self, layer: Layer, format: LayerFormat) -> tuple[str, ...]:
        """Tensors that must be in the layer's activation format."""
        if self._is_integer(layer, format) and self._needs_quantized_output(layer):
            return (layer.input, layer.output)
        return (layer.input,)

    def _needs_quantized_output(self, layer: Layer) -> bool:
        return self.target.needs_quantized_output(layer.op) or bool(self._merged_sums(layer))

    def _block_ends(self, layer: Layer) -> tuple[str, ...]:
        """Tensors that the layer, and what merges with it, reads and writes."""
        return (layer.input, layer.output, *self._merged_sums(layer))

    def _merged_sums(self, layer: Layer) -> tuple[str, ...]:
        """What the Adds write that the runtime makes one Gemm with the layer."""
        merges = layer.bias is None and len(self.tensors[layer.raw_output].shape) == 2
        if not merges or not self.target.has_quirk(Quirk.MATMUL_ADD_BECOMES_GEMM):
            return ()
        return self._sums_with_bias.get(layer.output, ())

    @cached_property
    def _sums_with_bias(self) -> dict[str, tuple[str, ...]]:
        """Tensor → what Adds of it and a constant write."""
        sums: dict[str, tuple[str, ...]] = {}
        for operator in self.structure.operators:
            if operator.op == "Add" and operator.has_float_constant:
                for name in operator.inputs:
                    sums[name] = (*sums.get(name, ()), *operator.outputs)
        return sums

    def _is_integer(self, layer: Layer, format: LayerFormat) -> bool:
        return self.target.executed(layer.op, format).startswith("int")

    def isolates(self, layer: Layer) -> bool:
        """Whether, computed in float behind a quantized input, the layer needs a DequantizeLinear of its own."""
        return self.target.has_quirk(Quirk.REQUANTIZES_FLOAT_LAYERS) and layer.name in self.costs.isolated

    def _float_formats(self, layer: Layer) -> tuple[str, ...]:
        return tuple(str(f) for f in self.layer_formats(layer) if not self._is_integer(layer, f))

    def _convertible(self, tensor: str) -> str | None:
        group = self.group_of.get(tensor)
        return group if group is not None and self.group_formats(group) else None

    @cached_property
    def _always_float(self) -> list[Operator]:
        return [o for o in self.structure.operators if o.name not in self._deciding and not self._is_mover(o)]
