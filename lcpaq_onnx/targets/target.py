"""Hardware targets: what is legal, what it executes in, what it costs. Data with a schema; see docs/targets.md."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from lcpaq_onnx.errors import TargetError
from lcpaq_onnx.formats import FLOAT_LAYER, LayerFormat, QFormat
from lcpaq_onnx.signature import KINDS, OperatorSignature, kinds_of
from lcpaq_onnx.targets.latency import LatencyEstimate, LatencyTable, read_latency_table
from lcpaq_onnx.targets.schema import (
    MODE,
    Executed,
    FrozenModel,
    Memory,
    OperatorRule,
    Quirk,
    Rates,
    Runtime,
    StorageRule,
    TensorFormat,
    Weights,
)

__all__ = ["Executed", "Quirk", "StorageRule", "Target"]

_NBITS: Mapping[int, Executed] = {2: "nbits2", 4: "nbits4", 8: "nbits8"}
_BLOCK_BITS = frozenset(_NBITS)


class Target(FrozenModel):
    """A validated descriptor with its latency table. Made by ``target_loader.load``.

    With ``weights.saturating_pairs`` two neighbouring products along the reduction share a 16-bit accumulator: the
    result is wrong where 255 * (|w1| + |w2|) > 32767. Weights of 7 bits cannot reach it.
    """

    name: str
    description: str
    schema_version: Literal[1] = Field(alias="schema")
    sources: tuple[str, ...]
    runtime: Runtime
    activations: dict[int, TensorFormat]
    weights: Weights
    storage: tuple[StorageRule, ...]
    operators: dict[str, OperatorRule]
    quirks: tuple[Quirk, ...] = ()
    rates: Rates
    memory: Memory = Memory()

    _table_file: Path | None = PrivateAttr(default=None)

    @classmethod
    def build(cls, json_text: str, table_file: Path | None) -> Target:
        """Validate the JSON text of a whole descriptor. Raises pydantic.ValidationError."""
        target = cls.model_validate_json(json_text)
        target._table_file = table_file
        return target

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        for bits, fmt in self.activations.items():
            if fmt.bits != bits or fmt.axis is not None:
                raise ValueError(f"activations.{bits}: '{fmt}' is not a per-tensor format of {bits} bits")
        stored = set(self.weights.stored_bits)
        if missing := set(self.weights.integer_bits) - stored:
            raise ValueError(f"weights.integer_bits: {sorted(missing)} missing from weights.stored_bits")
        if missing := stored - {bits for rule in self.storage if rule.block is None for bits in rule.bits}:
            raise ValueError(f"storage: no expression for the stored widths {sorted(missing)}")
        for storage in self.storage:
            self._check_blocks(storage)
        for op, rule in self.operators.items():
            self._check_operator(op, rule)
        if missing_kinds := [kind for kind in KINDS if not self.rates.has_rate("f32", kind)]:
            raise ValueError(f"rates.executed.f32.work_per_s: no rate for {', '.join(missing_kinds)}")
        for name in ("quantize_ns_per_element", "dequantize_ns_per_element"):
            if missing := set(self.activations) - set(getattr(self.rates, name)):
                raise ValueError(f"rates.{name}: no figure for {sorted(missing)} bits")
        return self

    def _check_blocks(self, rule: StorageRule) -> None:
        if rule.block is None:
            return
        if rule.expression != "plain":
            raise ValueError(f"storage: block = {rule.block} with '{rule.expression}', blocks are stored plain")
        if unknown := set(rule.bits) - _BLOCK_BITS:
            raise ValueError(f"storage: block = {rule.block} with {sorted(unknown)} bits, blocks have 2, 4 or 8")

    def _check_operator(self, op: str, rule: OperatorRule) -> None:
        for mode, executed in rule.layers.items():
            self._check_mode(op, mode, executed)
        if missing := set(rule.integer) - set(self.activations):
            raise ValueError(f"operators.{op}.integer: {sorted(missing)} missing from activations")
        values = set(self._executed_by(rule).values())
        for value in sorted(values | {f"int{bits}" for bits in rule.integer}):
            missing_kinds = [kind for kind in kinds_of(op) if not self.rates.has_rate(value, kind)]
            if missing_kinds:
                raise ValueError(
                    f"rates.executed.{value}.work_per_s: no rate for {', '.join(missing_kinds)}, needed by {op}"
                )

    def _check_mode(self, op: str, mode: str, executed: str) -> None:
        match = MODE.fullmatch(mode)
        if match is None or (mode.startswith("a") and int(mode[1:]) not in self.activations):
            blocks = sorted({rule.block for rule in self.storage if rule.block is not None})
            modes = ["weight-only", *(f"weight-only-b{block}" for block in blocks)]
            modes += [f"a{bits}" for bits in sorted(self.activations)]
            raise ValueError(f"operators.{op}.layers: unknown mode '{mode}', use {', '.join(modes)}")
        block = match["block"]
        if block is None and executed == "nbits":
            raise ValueError(f"operators.{op}.layers.{mode}: nbits computes with blocks only, as in weight-only-b32")
        if block is not None and executed not in ("nbits", "illegal"):
            raise ValueError(f"operators.{op}.layers.{mode}: '{executed}', use nbits or illegal")
        if block is not None and all(rule.block != int(block) for rule in self.storage):
            raise ValueError(f"operators.{op}.layers: no storage with block = {block} for '{mode}'")

    def _block_widths(self, block: int) -> tuple[int, ...]:
        """Widths that blocks can have under the ceilings of the runtime."""
        opset, ir = self.runtime.opset_max, self.runtime.ir_max
        rules = (rule for rule in self.storage if rule.block == block)
        return tuple(b for rule in rules if rule.min_opset <= opset and rule.min_ir <= ir for b in rule.bits)

    def layer_formats(self, op: str) -> tuple[LayerFormat, ...]:
        """Formats a layer of operator ``op`` may have: float, then widest first. Unknown operators: float only. Blocks
        also depend on the layer: ``takes_blocks``.
        """
        return (FLOAT_LAYER, *self._executed.get(op, ()))

    @cached_property
    def stored_formats(self) -> tuple[LayerFormat, ...]:
        """What a weight may be in the file, widest first, as weight-only formats."""
        blocks = {rule.block for rule in self.storage if rule.block is not None}
        formats = {LayerFormat(bits) for bits in self.weights.stored_bits}
        formats |= {LayerFormat(bits, block=block) for block in blocks for bits in self._block_widths(block)}
        return tuple(sorted(formats, key=_widest_first))

    def executed(self, op: str, layer_format: LayerFormat) -> Executed:
        """What the kernel computes in. Raises TargetError for a format that is not legal for ``op``."""
        if layer_format.is_float:
            return "f32"
        executed = self._executed.get(op, {}).get(layer_format)
        if executed is None:
            known = " ".join(map(str, self.layer_formats(op)))
            raise TargetError(f"target '{self.name}': {op} cannot be {layer_format}", hint=f"use one of {known}")
        return executed

    @cached_property
    def _executed(self) -> dict[str, dict[LayerFormat, Executed]]:
        """Operator → legal formats other than float, widest first, and what each computes in."""
        return {op: self._executed_by(rule) for op, rule in self.operators.items()}

    def _executed_by(self, rule: OperatorRule) -> dict[LayerFormat, Executed]:
        legal: dict[LayerFormat, Executed] = {}
        for mode, executed in rule.layers.items():
            if executed == "nbits":
                block = int(mode.rpartition("b")[2])
                legal |= {LayerFormat(bits, block=block): _NBITS[bits] for bits in self._block_widths(block)}
            elif executed != "illegal":
                activation = None if mode == "weight-only" else int(mode[1:])
                is_integer = executed.startswith("int")
                widths = self.weights.integer_bits if is_integer else self.weights.stored_bits
                legal |= {LayerFormat(bits, activation): executed for bits in widths}
        return dict(sorted(legal.items(), key=lambda item: _widest_first(item[0])))

    def runs_integer(self, op: str, activation_bits: int, attributes: Mapping[str, object] | None = None) -> bool:
        """Whether an operator without weights has an integer kernel between Q/DQ of ``activation_bits``.

        Operators that keep their input's scale (``graph.ops``) need the same scale on both sides. Some have the kernel
        for certain attribute values only (Resize: mode nearest): False unless ``attributes`` shows these.
        """
        rule = self.operators.get(op)
        if rule is None or activation_bits not in rule.integer:
            return False
        return all((attributes or {}).get(key) == value for key, value in rule.only_if.items())

    def moves_integers(self, op: str, activation_bits: int) -> bool:
        """Whether an operator that only moves data must be written on integers to run on them."""
        return activation_bits in self.operators.get(op, OperatorRule()).explicit

    def needs_quantized_output(self, op: str) -> bool:
        """Whether a layer's integer kernel exists only with a QuantizeLinear behind it."""
        return not self.operators.get(op, OperatorRule()).float_output

    def activation_format(self, bits: int) -> QFormat:
        """Per-tensor format of activations. Raises TargetError if the width is not legal."""
        if bits not in self.activations:
            raise TargetError(
                f"target '{self.name}' has no {bits}-bit activations",
                hint=f"use {' or '.join(str(b) for b in sorted(self.activations))} bits, or float",
            )
        return self.activations[bits]

    def weight_format(self, op: str, bits: int, channel_axis: int | None, *, block: int | None = None) -> QFormat:
        """Symmetric signed format of a weight, per channel along ``channel_axis`` where that is legal; with ``block``
        for blocks along axis 0 of a matrix. Raises TargetError if the width is not legal."""
        if block is not None and bits in self._block_widths(block):
            return QFormat(bits=bits, axis=0, block=block)
        if block is not None or bits not in self.weights.stored_bits:
            raise TargetError(
                f"target '{self.name}' stores no {bits}-bit weights{'' if block is None else f' in blocks of {block}'}",
                hint=f"use one of {', '.join(map(str, self.weights.stored_bits))} bits",
            )
        rule = self.operators.get(op, OperatorRule())
        per_channel = self.weights.per_channel if rule.per_channel is None else rule.per_channel
        return QFormat(bits=bits, axis=channel_axis if per_channel else None)

    def takes_blocks(self, bits: int, weight_shape: tuple[int, ...]) -> bool:
        """Whether a matrix [K, N] of that shape gives right results in blocks of ``bits``."""
        return bits != 2 or weight_shape[1] % 4 == 0 or not self.has_quirk(Quirk.INT2_BLOCKS_NEED_FOUR_COLUMNS)

    def storage_for(self, bits: int, *, block: int | None = None, opset_max: int | None = None) -> StorageRule:
        """The preferred way to store weights of ``bits``, in blocks if given, under the target's opset and IR ceilings,
        and under ``opset_max`` if given. Raises TargetError if none fits."""
        ceiling = min(self.runtime.opset_max, opset_max or self.runtime.opset_max)
        candidates = [rule for rule in self.storage if bits in rule.bits and rule.block == block]
        fitting = [rule for rule in candidates if rule.min_ir <= self.runtime.ir_max]
        for rule in fitting:
            if rule.min_opset <= ceiling:
                return rule
        least = min((rule.min_opset for rule in fitting), default=None)
        raise TargetError(
            f"target '{self.name}': {bits}-bit weights cannot be stored at opset {ceiling}",
            hint=f"allow opset {least}"
            if least
            else f"use one of {', '.join(map(str, self.weights.stored_bits))} bits",
        )

    def has_quirk(self, quirk: Quirk) -> bool:
        return quirk in self.quirks

    @cached_property
    def table(self) -> LatencyTable:
        """Measured latencies; empty where the target has none. Read at first use; raises TargetError."""
        return LatencyTable() if self._table_file is None else read_latency_table(self._table_file)

    def latency(self, signature: OperatorSignature, executed: str) -> LatencyEstimate:
        """Time of one node in microseconds: measured for this very signature, else by roofline. Raises TargetError
        where the target has no rate for that format and kind."""
        row = self.table.rows.get((signature.key, executed))
        if row is not None:
            return LatencyEstimate(row.latency_us, "table")
        return LatencyEstimate(self.roofline_us(signature, executed), "roofline")

    def roofline_us(self, signature: OperatorSignature, executed: str) -> float:
        """Time of one node from rates alone, in microseconds. Raises TargetError as ``latency`` does."""
        rates = self.rates.of(executed)
        if rates is None or signature.kind not in rates.work_per_s:
            raise TargetError(
                f"target '{self.name}' has no rate for {signature.kind} in {executed}",
                hint=f"add rates.executed.{executed}.work_per_s.{signature.kind} to the descriptor",
            )
        work_s = signature.work / rates.work_per_s[signature.kind]
        traffic_s = signature.bytes(executed) / rates.bandwidth_bytes_per_s
        return self.rates.dispatch_us + rates.kernel_us + max(work_s, traffic_s) * 1e6

    def conversion_us(self, kind: Literal["quantize", "dequantize"], elements: int, bits: int) -> float:
        """Time of one Q or DQ node over ``elements`` activations, in microseconds. Raises TargetError if the width is
        not legal."""
        self.activation_format(bits)
        rates = self.rates
        table = rates.quantize_ns_per_element if kind == "quantize" else rates.dequantize_ns_per_element
        return rates.dispatch_us + elements * table[bits] / 1000


def _widest_first(format: LayerFormat) -> tuple[int, int, int]:
    return -(format.weight_bits or 0), -(format.activation_bits or 32), format.block or 0
