"""From tables to the allocation problem: which decisions there are, what they cost, which go together.

Decisions: one per layer (named after its node), one per activation group, one per operator with an integer kernel, one
per width of packed storage. Values in, values out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from lcpaq_onnx.allocation.problem import (
    AllocationProblem,
    AnyOf,
    Boundary,
    Conjunction,
    Decision,
    MemoryStep,
    Option,
    Reference,
    Requirement,
    Tie,
)
from lcpaq_onnx.graph.query import ActivationGroup, Layer, Operator
from lcpaq_onnx.planning.choices import Choices
from lcpaq_onnx.tables import Cost, ErrorEntry, ErrorTable, LiveStep

__all__ = ["Formulation", "activation_decision"]

_NO_ERROR = ErrorEntry(0.0, 0.0)
_FLOAT_BITS = 32


def activation_decision(group: str) -> str:
    """Name of a group's decision; node names cannot start this way."""
    return f"activation {group}"


def _storage_decision(bits: int) -> str:
    return f"storage int{bits}"


@dataclass(frozen=True)
class Formulation(Choices):
    """The allocation problem that the choices make. ``explicit``: operators that are written on the integers of an
    8-bit group. ``float_size_bytes``: of the user's own file, what ``size<=0.5x`` is relative to.
    """

    errors: ErrorTable
    timeline: tuple[LiveStep, ...]
    float_size_bytes: int
    explicit: frozenset[str]

    def problem(self) -> AllocationProblem:
        """Raises nothing that a user causes: a layer without any legal quantized format stays float."""
        layers = [self._layer_decision(layer) for layer in self.structure.layers]
        groups = [self._group_decision(group) for group in self.structure.groups if self.group_formats(group.name)]
        operators = [self._operator_decision(operator) for operator in self._deciding.values()]
        unpackers = list(self._unpackers())
        reference = self.costs.reference
        return AllocationProblem(
            decisions=(*layers, *groups, *operators, *(decision for decision, _ in unpackers)),
            reference=Reference(self.float_size_bytes, reference.latency_us, reference.bops, self._float_peak_bytes()),
            requirements=tuple(self._requirements()),
            conjunctions=tuple(self._conjunctions()),
            any_ofs=tuple(rule for _, rule in unpackers),
            boundaries=tuple(self._boundaries()),
            ties=tuple(self._ties()),
            memory_steps=tuple(self._memory_steps()),
            fixed_size_bytes=self.costs.fixed_size_bytes,
            fixed_latency_us=sum(
                self.costs.operators[operator.name]["f32"].latency_us
                for operator in self.structure.operators
                if operator.name not in self._deciding and not self._is_mover(operator)
            ),
        )

    # ---- decisions --------------------------------------------------------------------------------------------------
    def _layer_decision(self, layer: Layer) -> Decision:
        options = []
        for format in self.layer_formats(layer):
            cost = self.costs.layers[layer.name][str(format)]
            bits = format.weight_bits
            stored_bits = (bits or _FLOAT_BITS) * self._shares.get(layer.name, 0.0)
            error = self.errors.of_layer(layer.name, format) or _NO_ERROR
            options.append(_option(str(format), error, cost, stored_bits))
        return Decision(layer.name, "layer", tuple(options))

    @cached_property
    def _shares(self) -> dict[str, float]:
        """Layer → its part of all weights. Of layers that share a weight only the first has one."""
        first = {layer.weight: layer for layer in reversed(self.structure.layers)}
        counts = {layer.name: prod(layer.weight_shape) for layer in first.values()}
        return {name: count / max(sum(counts.values()), 1) for name, count in counts.items()}

    def _group_decision(self, group: ActivationGroup) -> Decision:
        float_movers = sum(cost["f32"].latency_us for cost in self._movers(group))
        options = [_option("f32", _NO_ERROR, Cost(latency_us=float_movers))]
        for text in self.group_formats(group.name):
            bits = int(text[1:])
            error = self.errors.activations.get(group.name, {}).get(bits, _NO_ERROR)
            integer_movers = sum(cost["int8"].latency_us for cost in self._movers(group))
            latency_us = integer_movers + sum(self._fixed_conversions_us(name, bits) for name in group.tensors)
            size_bytes = self.costs.activations[group.name][text].size_bytes
            options.append(_option(text, error, Cost(size_bytes, latency_us)))
        return Decision(activation_decision(group.name), "activation", tuple(options))

    def _movers(self, group: ActivationGroup) -> list[dict[str, Cost]]:
        return [
            self.costs.operators[operator.name]
            for operator in self.structure.operators
            if self._is_mover(operator) and self.group_of[operator.outputs[0]] == group.name
        ]

    def _operator_decision(self, operator: Operator) -> Decision:
        costs = self.costs.operators[operator.name]
        options = tuple(_option(text, _NO_ERROR, costs[text]) for text in ("f32", "int8"))
        return Decision(operator.name, "operator", options)

    def _unpackers(self) -> Iterable[tuple[Decision, AnyOf]]:
        for bits, size_bytes in sorted(self.costs.unpack.items()):
            terms = []
            for layer in self.structure.layers:
                formats = tuple(str(f) for f in self.layer_formats(layer) if f.weight_bits == bits and f.block is None)
                if formats:
                    terms.append((layer.name, formats))
            if terms:
                name = _storage_decision(bits)
                options = (Option("absent"), Option("present", size_bytes=size_bytes))
                yield Decision(name, "storage", options), AnyOf(name, "present", tuple(terms))

    # ---- rules ------------------------------------------------------------------------------------------------------
    def _requirements(self) -> Iterable[Requirement]:
        for layer in self.structure.layers:
            by_operand: dict[tuple[str, str], list[str]] = {}
            for format in self.layer_formats(layer):
                if format.activation_bits is None:
                    continue
                for tensor in self._operands(layer, format):
                    key = (activation_decision(self.group_of[tensor]), f"a{format.activation_bits}")
                    by_operand.setdefault(key, []).append(str(format))
            for (group, wanted), formats in by_operand.items():
                yield Requirement(layer.name, tuple(formats), group, (wanted,))
            yield from self._one_width_or_float(layer)
            yield from self._float_ends(layer)

    def _one_width_or_float(self, layer: Layer) -> Iterable[Requirement]:
        """An integer kernel that can write float cannot requantize to another width."""
        group = self._convertible(layer.output)
        if group is None:
            return
        for format in self.layer_formats(layer):
            if format.activation_bits is None or not self._is_integer(layer, format):
                continue
            own = f"a{format.activation_bits}"
            legal = ("f32", *(text for text in self.group_formats(group) if text == own))
            yield Requirement(layer.name, (str(format),), activation_decision(group), legal)

    def _float_ends(self, layer: Layer) -> Iterable[Requirement]:
        """Beside a quantizer or dequantizer block-wise weights keep runtimes from choosing a kernel for them."""
        blocks = tuple(str(format) for format in self.layer_formats(layer) if format.block is not None)
        groups = {self._convertible(tensor) for tensor in self._block_ends(layer)} if blocks else set()
        for group in sorted(group for group in groups if group is not None):
            yield Requirement(layer.name, blocks, activation_decision(group), ("f32",))

    def _conjunctions(self) -> Iterable[Conjunction]:
        for operator in self._deciding.values():
            groups = dict.fromkeys(self.group_of[tensor] for tensor in (*operator.inputs, *operator.outputs))
            terms = tuple((activation_decision(group), ("a8",)) for group in groups)
            yield Conjunction(operator.name, "int8", terms)

    def _ties(self) -> Iterable[Tie]:
        """Layers that share one weight tensor store it once."""
        users: dict[str, list[str]] = {}
        for layer in self.structure.layers:
            users.setdefault(layer.weight, []).append(layer.name)
        for weight, names in users.items():
            if len(names) > 1:
                yield Tie(tuple(names), f"they share the weight '{weight}'")

    # ---- conversions ------------------------------------------------------------------------------------------------
    def _boundaries(self) -> Iterable[Boundary]:
        """A quantizer behind what computes in float, a dequantizer before it: paid only where the two sides differ."""
        for layer in self.structure.layers:
            floats = self._float_formats(layer)
            if not floats:
                continue
            if (group := self._convertible(layer.input)) is not None:
                yield from self._conversions(layer.name, floats, layer.input, group, "dequantize")
                yield from self._isolations(layer, floats, group)
            if (group := self._convertible(layer.output)) is not None:
                yield from self._conversions(layer.name, floats, layer.output, group, "quantize")
        for operator in self._deciding.values():
            for tensor in operator.inputs:
                yield from self._conversions(operator.name, ("f32",), tensor, self.group_of[tensor], "dequantize")
            for tensor in operator.outputs:
                yield from self._conversions(operator.name, ("f32",), tensor, self.group_of[tensor], "quantize")

    def _conversions(
        self, node: str, floats: tuple[str, ...], tensor: str, group: str, kind: str
    ) -> Iterable[Boundary]:
        elements = self.tensors[tensor].elements
        for text in self.group_formats(group):
            cost_us = self.target.conversion_us(
                "quantize" if kind == "quantize" else "dequantize", elements, int(text[1:])
            )
            reason = f"{kind} '{tensor}'"
            yield Boundary(node, floats, activation_decision(group), (text,), latency_us=cost_us, reason=reason)

    def _isolations(self, layer: Layer, floats: tuple[str, ...], group: str) -> Iterable[Boundary]:
        if not self.isolates(layer):
            return
        size_bytes = self.costs.isolated[layer.name].size_bytes
        formats = self.group_formats(group)
        reason = "the runtime would quantize this layer's float weights"
        yield Boundary(layer.name, floats, activation_decision(group), formats, size_bytes=size_bytes, reason=reason)

    def _fixed_conversions_us(self, tensor: str, bits: int) -> float:
        """Conversions of a quantized tensor at neighbours that are float whatever is decided."""
        elements = self.tensors[tensor].elements
        total = 0.0
        if self._float_writers.get(tensor, 0):
            total += self.target.conversion_us("quantize", elements, bits)
        return total + self._float_readers.get(tensor, 0) * self.target.conversion_us("dequantize", elements, bits)

    @cached_property
    def _float_writers(self) -> dict[str, int]:
        counts = dict.fromkeys(self.structure.inputs, 1)
        for operator in self._always_float:
            for tensor in operator.outputs:
                counts[tensor] = counts.get(tensor, 0) + 1
        return counts

    @cached_property
    def _float_readers(self) -> dict[str, int]:
        counts = dict.fromkeys(self.structure.outputs, 1)
        for operator in self._always_float:
            for tensor in operator.inputs:
                counts[tensor] = counts.get(tensor, 0) + 1
        return counts

    # ---- memory -----------------------------------------------------------------------------------------------------
    def _memory_steps(self) -> Iterable[MemoryStep]:
        for step in self.timeline:
            fixed, live = step.fixed_bytes, []
            for group, elements in step.groups.items():
                formats = self.group_formats(group)
                if not formats:
                    fixed += 4 * elements
                    continue
                sizes = (("f32", 4 * elements), *((f, elements * int(f[1:]) // 8) for f in formats))
                live.append((activation_decision(group), sizes))
            yield MemoryStep(step.node, fixed, tuple(live))

    def _float_peak_bytes(self) -> int:
        return max((s.fixed_bytes + 4 * sum(s.groups.values()) for s in self.timeline), default=0)


def _option(format: str, error: ErrorEntry, cost: Cost, stored_bits: float = 0.0) -> Option:
    return Option(format, error.loss, error.squared_error, cost.size_bytes, cost.latency_us, cost.bops, stored_bits)
