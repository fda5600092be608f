"""Checks of the emitted file alone: is it valid, does it hold what the plan decided, bit for bit, and no more."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lcpaq_onnx.graph.emit import isolated_name
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.graph.stored import StoredWeight, stored_weight
from lcpaq_onnx.graph.written import WrittenModel, WrittenNode, check_file
from lcpaq_onnx.planning.plan import ActivationPlan, LayerPlan, Plan
from lcpaq_onnx.provenance import model_metadata
from lcpaq_onnx.targets.target import Target
from lcpaq_onnx.verification.report import Check

__all__ = ["file_checks", "has_exact_bias"]

# Failures named in full; the rest are counted.
_NAMED = 3


def file_checks(path: Path, model: WrittenModel, source: WrittenModel, plan: Plan, target: Target) -> list[Check]:
    """All checks that need no run. ``model``: the file at ``path``, read back; ``source``: the model it was made of."""
    complaint = check_file(path)
    return [
        Check(name="onnx-checker", passed=not complaint, detail=complaint or "full check: types and shapes"),
        _opset(model, plan, target),
        _stamp(model, plan),
        _size(model, plan),
        _check("weights-as-planned", _weights(model, plan), f"{len(plan.layers)} layers read back"),
        _check(
            "activations-as-planned", _activations(model, source, plan), f"{_tensors(plan)} quantized tensors read back"
        ),
    ]


def has_exact_bias(model: WrittenModel, node: WrittenNode) -> bool:
    """Whether the int32 bias of a layer has the scale float32(input scale × weight scale), as integer kernels assume.
    True for a layer without such a bias.
    """
    bias = _dequantize(model, node.inputs[2]) if len(node.inputs) > 2 else None
    data, weight = _dequantize(model, node.inputs[0]), _dequantize(model, node.inputs[1])
    if bias is None or data is None or weight is None:
        return True
    x, w, b = (_value(model, dequantize.inputs[1]) for dequantize in (data, weight, bias))
    return x is not None and w is not None and b is not None and bool(np.array_equal(_first(x) * w, b))


def _opset(model: WrittenModel, plan: Plan, target: Target) -> Check:
    runtime = target.runtime
    seen = f"opset {model.opset} of at most {runtime.opset_max}, IR {model.ir_version} of at most {runtime.ir_max}"
    problems = []
    if model.opset > runtime.opset_max or model.ir_version > runtime.ir_max:
        problems.append("above the target's ceiling")
    if model.opset != plan.opset:
        problems.append(f"planned opset {plan.opset}")
    return Check(name="opset", passed=not problems, detail="; ".join([seen, *problems]))


def _stamp(model: WrittenModel, plan: Plan) -> Check:
    expected = model_metadata(plan.target, plan.sha256())
    wrong = [
        f"{key} is {model.metadata.get(key)!r}" for key, value in expected.items() if model.metadata.get(key) != value
    ]
    return _check("plan-stamp", wrong, f"made by plan {plan.sha256()[:12]}")


def _size(model: WrittenModel, plan: Plan) -> Check:
    difference = model.size_bytes - plan.predicted.size_bytes
    detail = f"{model.size_bytes:,} bytes on disk, {plan.predicted.size_bytes:,} predicted"
    return Check(name="size", passed=not difference, detail=detail + (f" ({difference:+,})" if difference else ""))


# ---- weights --------------------------------------------------------------------------------------------------------
def _weights(model: WrittenModel, plan: Plan) -> Iterable[str]:
    for layer in plan.layers:
        problem = _layer(model, layer)
        if problem:
            yield f"{layer.name}: {problem}"


def _layer(model: WrittenModel, layer: LayerPlan) -> str:
    node = model.by_name.get(layer.name)
    # Rows of a table are picked from its integers.
    names = (layer.weight, f"{layer.weight}/q") if facts_of(layer.op).looks_up else (layer.weight,)
    if node is None or node.op != layer.op or not any(name in node.inputs for name in names):
        return f"no {layer.op} of that name that reads '{layer.weight}'"
    stored = stored_weight(model, layer.weight)
    if stored is None:
        return f"weight '{layer.weight}' is stored in an unknown way"
    isolated = node.inputs[0] == isolated_name(layer.input, layer.name)
    if problem := _stored(layer, stored) or _bias(model, layer, node):
        return problem
    return "" if isolated == layer.isolate_input else f"its input is {'' if isolated else 'not '}isolated"


def _stored(layer: LayerPlan, stored: StoredWeight) -> str:
    if layer.weight_format == "f32":
        return "" if stored.storage == "float" else f"planned f32, stored {stored}"
    format = layer.qformat
    if stored.storage != layer.storage:
        return f"planned {layer.storage}, stored {stored.storage}"
    if stored.bits != format.bits and not (layer.storage == "plain" and stored.fits(format.qmin, format.qmax)):
        return f"planned {format.bits} bits, stored {stored.bits}"
    if not stored.has_scales_of(format):
        where = "one scale" if format.axis is None else f"a scale per index of axis {format.axis}"
        where = where if format.block is None else f"a scale per block of {format.block} along axis {format.axis}"
        return f"planned {where}, stored scales of shape {list(stored.scale_shape)}"
    if stored.with_scale_only != layer.layer_format.is_folded:
        return "planned weight only" if layer.layer_format.is_folded else "planned a DequantizeLinear"
    if not (stored.with_scale_only or stored.has_zero_point or stored.block):
        return "no zero point behind its DequantizeLinear"
    return ""


def _bias(model: WrittenModel, layer: LayerPlan, node: WrittenNode) -> str:
    if layer.bias_format is None or layer.bias is None:
        return ""
    dequantize = _dequantize(model, layer.bias)
    integers = model.constants.get(dequantize.inputs[0]) if dequantize is not None else None
    if layer.bias_format == "f32":
        return "" if dequantize is None else "planned a float bias, stored integers"
    if integers is None or integers.dtype != "INT32":
        return "planned an int32 bias, stored another"
    return "" if has_exact_bias(model, node) else "the bias scale is not float32(input scale × weight scale)"


# ---- activations ----------------------------------------------------------------------------------------------------
def _activations(model: WrittenModel, source: WrittenModel, plan: Plan) -> Iterable[str]:
    for group in plan.activations:
        for tensor in group.tensors:
            problem = _tensor(model, tensor, group)
            if problem:
                yield f"{tensor}: {problem}"
    added = _quantize_nodes(model) - _quantize_nodes(source)
    expected = _tensors(plan) - sum(len(group.integer_nodes) for group in plan.activations)
    if added != expected:
        yield f"{added} new QuantizeLinear nodes for {expected} planned tensors"


def _tensor(model: WrittenModel, tensor: str, group: ActivationPlan) -> str:
    format = group.qformat
    quantize = _quantize(model, tensor)
    if format is None:
        return "" if quantize is None else "planned f32, the file has a QuantizeLinear"
    integers = f"{tensor}/q" if quantize is None else quantize.outputs[0]
    writer, readers = model.producers.get(integers), model.readers.get(integers, ())
    moved = group.integer_nodes
    if quantize is None and (writer is None or writer.name not in moved):
        return f"planned {group.format}, the file has no QuantizeLinear"
    # A float layer's own DequantizeLinear repeats the scale along an axis on purpose.
    shared = [node for node in readers if node.op == "DequantizeLinear" and "axis" not in node.attributes]
    if len(shared) != (0 if readers and all(node.name in moved for node in readers) else 1):
        return f"{len(shared)} DequantizeLinear nodes behind its QuantizeLinear"
    for node in (*(() if quantize is None else (quantize,)), *shared):
        problem = _parameters(model, node, group, f"{'' if format.signed else 'U'}INT{8 if format.bits <= 8 else 16}")
        if problem:
            return f"{node.op}: {problem}"
    return ""


def _parameters(model: WrittenModel, node: WrittenNode, group: ActivationPlan, dtype: str) -> str:
    scale = model.constants.get(node.inputs[1])
    zero_point = model.constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or zero_point is None:
        return f"no constant {'scale' if scale is None else 'zero point'}"
    if scale.shape or zero_point.shape:
        return f"scale of shape {list(scale.shape)}, zero point of shape {list(zero_point.shape)}; both must be 0-d"
    if float(scale.values) != float(np.float32(group.scale)):
        return f"scale {float(scale.values):.9g}, planned {group.scale:.9g}"
    if zero_point.dtype != dtype or int(zero_point.values) != group.zero_point:
        return f"zero point {zero_point.dtype} {int(zero_point.values)}, planned {dtype} {group.zero_point}"
    return ""


def _quantize(model: WrittenModel, tensor: str) -> WrittenNode | None:
    """The QuantizeLinear of an activation: behind a graph input, before the DequantizeLinear of any other tensor, or
    the writer of its integers where nobody needs them dequantized.
    """
    if tensor in model.inputs:
        return next((node for node in model.readers.get(tensor, ()) if node.op == "QuantizeLinear"), None)
    dequantize = _dequantize(model, tensor)
    quantize = model.producers.get(f"{tensor}/q" if dequantize is None else dequantize.inputs[0])
    return quantize if quantize is not None and quantize.op == "QuantizeLinear" else None


# ---- small ----------------------------------------------------------------------------------------------------------
def _dequantize(model: WrittenModel, tensor: str) -> WrittenNode | None:
    producer = model.producers.get(tensor)
    return producer if producer is not None and producer.op == "DequantizeLinear" else None


def _value(model: WrittenModel, name: str) -> np.ndarray | None:
    constant = model.constants.get(name)
    return None if constant is None else constant.values


def _first(scale: np.ndarray) -> np.float32:
    return np.float32(scale.reshape(-1)[0])


def _tensors(plan: Plan) -> int:
    return sum(len(group.tensors) for group in plan.activations if group.format != "f32")


def _quantize_nodes(model: WrittenModel) -> int:
    return sum(node.op == "QuantizeLinear" for node in model.nodes)


def _check(name: str, problems: Iterable[str], detail: str) -> Check:
    found = list(problems)
    text = "; ".join(found[:_NAMED]) + (f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
    return Check(name=name, passed=not found, detail=text or detail)
