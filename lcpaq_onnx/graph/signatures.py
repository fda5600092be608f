"""Signatures of nodes: counts and a text of shapes and attributes, from which latency and BOPs are predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import onnx.defs
import onnx_graphsurgeon as gs

from lcpaq_onnx.errors import ModelError
from lcpaq_onnx.signature import Kind, OperatorSignature, kinds_of

__all__ = ["Shape", "is_known_operator", "known_operators", "signature_of", "signature_of_shapes"]

Shape = tuple[int, ...]

# Attributes that change what elementwise, pooling and moving kernels do, hence their time.
_DETAIL_ATTRIBUTES = ("axis", "blocksize", "mode", "perm")
# Stands for an optional input that is left out: no elements.
_ABSENT: Shape = (0,)


def is_known_operator(name: str) -> bool:
    """Whether the default ONNX domain has an operator of that name."""
    return bool(onnx.defs.has(name))


def known_operators() -> frozenset[str]:
    """Names of all operators of the default ONNX domain."""
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "")


def signature_of(node: gs.Node, shapes: Mapping[str, Shape]) -> OperatorSignature:
    """Signature of ``node``; ``shapes``: tensor name → shape as recorded when the model ran (axis 0 the batch).

    Raises ModelError where a shape is missing.
    """
    inputs: list[Shape] = []
    constants: set[int] = set()
    for index, tensor in enumerate(node.inputs):
        if isinstance(tensor, gs.Constant):
            constants.add(index)
            inputs.append(tuple(int(extent) for extent in tensor.shape))
        else:
            inputs.append(_ABSENT if tensor.is_empty() else _shape(node, tensor.name, shapes))
    outputs = [_shape(node, tensor.name, shapes) for tensor in node.outputs if tensor.name]
    return signature_of_shapes(node.op, node.attrs, inputs, outputs, frozenset(constants))


def signature_of_shapes(
    op: str,
    attributes: Mapping[str, object],
    inputs: Sequence[Shape],
    outputs: Sequence[Shape],
    constants: frozenset[int],
) -> OperatorSignature:
    """Signature from plain values; ``constants``: indices of the inputs that are constants. An absent optional input
    has shape ``(0,)``."""
    kind, macs, detail = _describe(op, attributes, inputs, outputs, constants)
    weights = sum(prod(shape) for index, shape in enumerate(inputs) if index in constants)
    if op == "Gather" and 0 in constants:
        weights = sum(map(prod, outputs))  # of a table it touches the rows that it copies
    return OperatorSignature(
        op=op,
        kind=kind,
        macs=macs,
        input_elements=sum(prod(shape) for index, shape in enumerate(inputs) if index not in constants),
        output_elements=sum(prod(shape) for shape in outputs),
        weight_elements=weights,
        detail=detail,
    )


def _shape(node: gs.Node, tensor: str, shapes: Mapping[str, Shape]) -> Shape:
    if tensor not in shapes:
        raise ModelError(
            f"no recorded shape for tensor '{tensor}' of node '{node.name}' ({node.op})",
            hint="record shapes by running the whole model on one sample",
        )
    return shapes[tensor]


def _describe(
    op: str,
    attributes: Mapping[str, object],
    inputs: Sequence[Shape],
    outputs: Sequence[Shape],
    constants: frozenset[int],
) -> tuple[Kind, int, str]:
    if op in ("Conv", "ConvTranspose") and len(inputs) > 1 and len(inputs[1]) > 2:
        return _convolution(op, attributes, inputs, outputs)
    if op == "Gemm" and len(inputs) > 1:
        return _gemm(attributes, inputs, outputs)
    if op == "MatMul" and len(inputs) > 1:
        # MatMul-13: [..., M, K] x [..., K, N]; a vector on the left is one row.
        macs = prod(outputs[0]) * (inputs[0][-1] if inputs[0] else 1)
        operands = f"{_unbatched(inputs[0])} x {_text(inputs[1])}"
        return "matmul", macs, f"{_batch(inputs[0])}{operands} -> {_unbatched(outputs[0])}"
    return _plain(op, attributes, inputs, outputs, constants)


def _convolution(
    op: str, attributes: Mapping[str, object], inputs: Sequence[Shape], outputs: Sequence[Shape]
) -> tuple[Kind, int, str]:
    """Conv-11 weight [M, C/g, k…], every output element costs C/g * k. ConvTranspose-11 weight [C, M/g, k…], every
    input element costs M/g * k."""
    data, weight, result = inputs[0], inputs[1], outputs[0]
    group = _integer(attributes.get("group", 1))
    kernel = weight[2:]
    ones = (1,) * len(kernel)
    strides, dilations = (_integers(attributes.get(key), ones) for key in ("strides", "dilations"))
    macs = prod(result if op == "Conv" else data) * prod(weight[1:])
    kind: Kind = "convtranspose"
    if op == "Conv":
        depthwise = group > 1 and weight[1] == 1
        kind = "depthwise" if depthwise else "pointwise" if group == 1 and prod(kernel) == 1 else "conv"
    window = f"k{_text(kernel)} s{_text(strides)} d{_text(dilations)} g{group}"
    return kind, macs, f"{_batch(data)}{_text(data[1:])} {window} -> {_text(result[1:])}"


def _gemm(attributes: Mapping[str, object], inputs: Sequence[Shape], outputs: Sequence[Shape]) -> tuple[Kind, int, str]:
    """Gemm-13: A is [M, K], [K, M] with transA; M is the batch."""
    depth = inputs[0][0 if attributes.get("transA", 0) else 1]
    rows, columns = outputs[0]
    return "gemm", rows * columns * depth, f"{_batch(outputs[0])}{depth} -> {columns}"


def _plain(
    op: str,
    attributes: Mapping[str, object],
    inputs: Sequence[Shape],
    outputs: Sequence[Shape],
    constants: frozenset[int],
) -> tuple[Kind, int, str]:
    words = []
    if "kernel_shape" in attributes:
        kernel = _integers(attributes["kernel_shape"], ())
        words += [f"k{_text(kernel)}", f"s{_text(_integers(attributes.get('strides'), (1,) * len(kernel)))}"]
    words += [f"{key}={_value(attributes[key])}" for key in _DETAIL_ATTRIBUTES if key in attributes]
    operands = [
        _text(shape) if index in constants else _unbatched(shape)
        for index, shape in enumerate(inputs)
        if shape != _ABSENT
    ]
    moving = [shape for index, shape in enumerate(inputs) if index not in constants]
    batch = _batch(moving[0]) if moving else ""
    results = [_unbatched(shape) for shape in outputs]
    return kinds_of(op)[0], 0, batch + " ".join([" + ".join(operands), *words, "->", " + ".join(results)]).strip()


def _batch(shape: Shape) -> str:
    return f"b{shape[0]} " if len(shape) > 1 and shape[0] != 1 else ""


def _unbatched(shape: Shape) -> str:
    """Axis 0 left out where it is a batch, that is where the tensor has more axes."""
    return _text(shape[1:]) if len(shape) > 1 else _text(shape)


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _value(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise ModelError(f"attribute value {value!r} is not an integer", hint="check the model with onnx.checker")
    return value


def _integers(value: object, default: Shape) -> Shape:
    if value is None:
        return default
    if not isinstance(value, (list, tuple)):
        raise ModelError(
            f"attribute value {value!r} is not a list of integers", hint="check the model with onnx.checker"
        )
    return tuple(_integer(item) for item in value)
