"""From an allocation to a plan: names, formats, scales and the reason for each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lcpaq_onnx.allocation.allocate import Allocation, Objective
from lcpaq_onnx.allocation.problem import AllocationProblem, Option
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.formats import LayerFormat, QFormat
from lcpaq_onnx.graph.query import ActivationGroup, Layer, input_channels
from lcpaq_onnx.graph.size_model import SizeModel, StoredLayer
from lcpaq_onnx.numeric.rounding import activation_parameters
from lcpaq_onnx.planning.formulate import Formulation, activation_decision
from lcpaq_onnx.planning.plan import ActivationPlan, LayerPlan, Plan, Predicted, Proof, Storage
from lcpaq_onnx.provenance import TOOL_VERSION
from lcpaq_onnx.tables import ActivationRange

__all__ = ["PlanRequest", "write_plan"]

_STORAGE: Mapping[str, Storage] = {"plain": "plain", "cast": "cast", "packed-bytes": "packed-bytes"}


@dataclass(frozen=True)
class PlanRequest:
    """What a plan was asked for: goes into the plan as it is."""

    source_sha256: str
    budgets: Sequence[Budget]
    objective: Sequence[Objective]
    opset: int
    ir_version: int


def write_plan(
    formulation: Formulation,
    problem: AllocationProblem,
    allocation: Allocation,
    ranges: Mapping[str, ActivationRange],
    sizes: SizeModel,
    request: PlanRequest,
) -> Plan:
    """The plan that ``allocation`` stands for."""
    writer = _Writer(formulation, problem, allocation, ranges)
    layers = tuple(writer.layer(layer) for layer in formulation.structure.layers)
    activations = tuple(writer.activation(group) for group in formulation.structure.groups if writer.decides(group))
    totals, reference = allocation.totals, problem.reference
    is_measured = bool(formulation.errors.layers)
    return Plan(
        tool_version=TOOL_VERSION,
        source_sha256=request.source_sha256,
        target=formulation.target.name,
        budgets=tuple(map(str, request.budgets)),
        objective=tuple(request.objective),
        opset=request.opset,
        ir_version=request.ir_version,
        layers=layers,
        activations=activations,
        predicted=Predicted(
            loss=totals.loss if is_measured else None,
            relative_error=totals.relative_error if is_measured else None,
            size_bytes=_exact_size(formulation, layers, activations, sizes),
            latency_us=totals.latency_us,
            bops=totals.bops,
            stored_bits=totals.stored_bits,
            peak_memory_bytes=totals.peak_memory_bytes,
            float_size_bytes=reference.size_bytes,
            float_latency_us=reference.latency_us,
            float_bops=reference.bops,
            float_peak_memory_bytes=reference.peak_memory_bytes,
        ),
        proof=Proof(
            optimal=allocation.proved_optimal,
            gap=allocation.gap,
            solver="HiGHS through OR-Tools MathOpt",
            shadow_prices=tuple(price.text for price in allocation.shadow_prices),
        ),
    )


def _exact_size(
    formulation: Formulation, layers: Sequence[LayerPlan], activations: Sequence[ActivationPlan], sizes: SizeModel
) -> int:
    stored = {
        layer.name: StoredLayer(
            weight=None if layer.weight_format == "f32" else layer.qformat,
            storage=layer.storage,
            with_scale_only=layer.layer_format.is_folded,
            integer_bias=layer.bias_format == "int32",
            isolated=layer.isolate_input,
        )
        for layer in layers
    }
    channels = {layer.name: layer.input_channels for layer in layers if layer.isolate_input}
    return sizes.total(stored, {group.name: group.qformat for group in activations}, channels)


class _Writer:
    def __init__(
        self,
        formulation: Formulation,
        problem: AllocationProblem,
        allocation: Allocation,
        ranges: Mapping[str, ActivationRange],
    ) -> None:
        self._formulation = formulation
        self._problem = problem
        self._chosen = allocation.assignment
        self._ranges = ranges

    def decides(self, group: ActivationGroup) -> bool:
        return activation_decision(group.name) in self._chosen

    def layer(self, layer: Layer) -> LayerPlan:
        f = self._formulation
        text = self._chosen[layer.name]
        format = LayerFormat.parse(text)
        executed = f.target.executed(layer.op, format)
        is_integer = executed.startswith("int")
        error = f.errors.of_layer(layer.name, format)
        cost = f.costs.layers[layer.name][text]
        isolated = not is_integer and f.isolates(layer) and self._format_of(layer.input) is not None
        weight_format = storage = None
        if format.weight_bits is not None:
            bits, axis = format.weight_bits, layer.channel_axis
            weight_format = f.target.weight_format(layer.op, bits, axis, block=format.block)
            storage = _STORAGE[f.costs.storage[format.stored]]
        return LayerPlan(
            name=layer.name,
            op=layer.op,
            format=text,
            executed=executed,
            input=layer.input,
            input_channels=input_channels(layer, f.tensors) if isolated else 0,
            weight=layer.weight,
            weight_format="f32" if weight_format is None else str(weight_format),
            storage=storage or "float",
            scale_source="" if weight_format is None else ("absmax" if weight_format.bits >= 8 else "mse"),
            rounding=None if weight_format is None else "nearest",
            bias=layer.bias,
            bias_format=None if layer.bias is None else ("int32" if is_integer else "f32"),
            isolate_input=isolated,
            reason=self._layer_reason(layer, text),
            loss=error.loss if error else 0.0,
            loss_stderr=error.loss_stderr if error else 0.0,
            size_bytes=cost.size_bytes,
            latency_us=cost.latency_us,
            latency_source=cost.source,
        )

    def activation(self, group: ActivationGroup) -> ActivationPlan:
        text = self._chosen[activation_decision(group.name)]
        interval = self._ranges[group.name]
        format = self._qformat(text)
        if format is None:
            reason = "no integer kernel reads or writes it in this plan"
            return ActivationPlan(name=group.name, tensors=group.tensors, format="f32", reason=reason)
        # 16 bits have levels to spare: clipping would only lose.
        ends = (interval.low, interval.high) if format.bits <= 8 else (interval.minimum, interval.maximum)
        scale, zero_point = activation_parameters(*ends, format)
        error = self._formulation.errors.activations.get(group.name, {}).get(format.bits)
        return ActivationPlan(
            name=group.name,
            tensors=group.tensors,
            format=str(format),
            scale=float(scale),
            zero_point=zero_point,
            range=ends,
            scale_source=interval.method if format.bits <= 8 else "minmax",
            integer_nodes=self._integer_nodes(group) if format.bits == 8 else (),
            reason="read or written by an integer kernel" if format.bits <= 8 else "16 bits keep the error down",
            loss=error.loss if error else 0.0,
            loss_stderr=error.loss_stderr if error else 0.0,
        )

    def _integer_nodes(self, group: ActivationGroup) -> tuple[str, ...]:
        f = self._formulation
        return tuple(
            operator.name
            for operator in f.structure.operators
            if operator.name in f.explicit and f.group_of[operator.outputs[0]] == group.name
        )

    def _format_of(self, tensor: str) -> QFormat | None:
        group = self._formulation.group_of.get(tensor)
        chosen = self._chosen.get(activation_decision(group)) if group is not None else None
        return None if chosen is None else self._qformat(chosen)

    def _qformat(self, text: str) -> QFormat | None:
        return None if text == "f32" else self._formulation.target.activation_format(int(text[1:]))

    def _layer_reason(self, layer: Layer, text: str) -> str:
        options = self._problem.decision_of[layer.name].options
        if len(options) == 1:
            return "the only format that is legal and allowed here"
        chosen = self._problem.option_of[layer.name, text]
        if text != "f32":
            return _reason_quantized(chosen, options)
        fastest = min((o for o in options if o.format != "f32"), key=lambda o: o.latency_us)
        if fastest.latency_us >= chosen.latency_us:
            return f"float is as fast here ({chosen.latency_us:.1f} us, {fastest.format} {fastest.latency_us:.1f} us)"
        if fastest.loss > chosen.loss:
            return f"{fastest.format} would add {fastest.loss:.2g} to the loss"
        return "conversions around it would cost more than integer execution saves"


def _reason_quantized(chosen: Option, options: Sequence[Option]) -> str:
    """Why a quantized format: against wider storage of the same kind, else against float."""
    activation = LayerFormat.parse(chosen.format).activation_bits
    formats = {option: LayerFormat.parse(option.format) for option in options if option.format != "f32"}
    widest = next(o for o, format in formats.items() if format.activation_bits == activation)
    if chosen.format != widest.format:
        saved, added = widest.size_bytes - chosen.size_bytes, chosen.loss - widest.loss
        return f"saves {saved:,} bytes against {widest.format} for {added:.2g} more loss"
    plain = next((option for option in options if option.format == "f32"), None)
    if plain is None:
        return "the widest format allowed"
    if activation is None:
        return f"stored in {formats[chosen].weight_bits} bits, computed in float: integer execution would gain no time"
    return f"{chosen.latency_us:.1f} us in integer, {plain.latency_us:.1f} us in float"
