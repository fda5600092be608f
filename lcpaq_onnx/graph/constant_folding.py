"""The value of a node whose inputs are all constants, without a runtime: by ONNX's reference implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from lcpaq_onnx.graph.exporting import Exporter
from lcpaq_onnx.graph.model import DEFAULT_DOMAINS, Graph
from lcpaq_onnx.graph.tensors import (
    StoredConstant,
    StoredSparseValues,
    numpy_dtype,
    onnx_dtype,
    payload_bytes,
)

__all__ = ["Evaluation", "SizeLimit", "evaluate", "is_constant_node", "lift_constant", "stored_bytes"]

# Data movement, casts, comparisons, integer and correctly rounded float arithmetic: every runtime gets the same bits.
_EXACT = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Cast",
        "CastLike",
        "Ceil",
        "Concat",
        "ConstantOfShape",
        "DepthToSpace",
        "Div",
        "Equal",
        "Expand",
        "EyeLike",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "OneHot",
        "Or",
        "Pad",
        "Range",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Sign",
        "Size",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
# What weights are made of at export (weight norm, rotary tables): runtimes may differ in the last place.
_ROUNDED = frozenset(
    [
        "Cos",
        "Einsum",
        "Erf",
        "Exp",
        "Log",
        "MatMul",
        "Mean",
        "Pow",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Sigmoid",
        "Sin",
        "Softplus",
        "Sum",
        "Tan",
        "Tanh",
    ]
)
_STORAGE = frozenset({"DequantizeLinear", "QuantizeLinear"})

_INLINE_BYTES = 1024
"""Constants up to this size are shown to shape inference, which needs the values of shapes, axes, repeats."""


@dataclass(frozen=True)
class SizeLimit:
    """A result may take ``growth`` times the bytes of the inputs, or ``small_bytes``."""

    growth: float
    small_bytes: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Values of all outputs, in order; or, with none, the ``reason``."""

    values: tuple[NDArray[Any], ...] = ()
    reason: str = ""


def is_constant_node(node: gs.Node) -> bool:
    """Whether ``node`` is ONNX's Constant."""
    return node.op == "Constant" and (node.domain or "") in DEFAULT_DOMAINS


def lift_constant(node: gs.Node) -> bool:
    """Turn the output of a Constant node in place into a constant: any of its value attributes. A dense
    payload is not touched.

    The node is left without inputs and outputs. False, and nothing is changed, for an attribute nobody knows.
    """
    if len(node.attrs) != 1 or len(node.outputs) != 1:
        return False
    ((name, value),) = node.attrs.items()
    values = _attribute_values(name, value)
    if values is None:
        return False
    (tensor,) = node.outputs
    node.outputs.clear()
    _make_constant(tensor, values)
    return True


def evaluate(graph: Graph, node: gs.Node, limit: SizeLimit) -> Evaluation:
    """Values of the outputs of ``node``, a top-level node of ``graph`` whose inputs are all constants.

    Types and shapes are those that ONNX's shape inference gives; no result is made that is over the limit.
    """
    refusal = _refusal(node)
    if refusal:
        return Evaluation(reason=refusal)
    inputs = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    small = [tensor for tensor in inputs if stored_bytes(tensor) <= _INLINE_BYTES]
    inlined = {id(tensor) for tensor in small}
    fed = [tensor for tensor in inputs if id(tensor) not in inlined]
    model = _one_node_model(graph, node, small, fed)
    expected = _inferred(model)
    if expected is None:
        return Evaluation(reason="shape inference cannot tell the type and shape of its result")
    result_bytes = sum(payload_bytes(dtype, math.prod(shape)) for dtype, shape in expected)
    input_bytes = sum(stored_bytes(tensor) for tensor in {id(t): t for t in inputs}.values())
    if result_bytes > max(limit.growth * input_bytes, limit.small_bytes):
        return Evaluation(reason=f"its result would take {result_bytes} bytes, its constant inputs take {input_bytes}")
    return _run(model, {tensor.name: tensor.values for tensor in fed}, expected)


def stored_bytes(constant: gs.Constant) -> int:
    """Bytes of the payload in raw_data, sub-byte types packed."""
    return payload_bytes(np.dtype(constant.dtype), math.prod(constant.shape))


def _refusal(node: gs.Node) -> str:
    if (node.domain or "") not in DEFAULT_DOMAINS:
        return f"operators of domain '{node.domain}' are not evaluated"
    if node.op in _STORAGE:
        return "it is how quantized tensors are stored"
    if node.op not in _EXACT | _ROUNDED:
        return f"{node.op} is not among the operators that are evaluated"
    if node.op != "Cast":
        return ""
    (source,) = node.inputs
    integer = isinstance(source, gs.Constant) and "int" in np.dtype(source.dtype).name
    if integer and payload_bytes(np.dtype(source.dtype), 8) <= 8:
        return "a Cast of integers of 8 bits or fewer is how packed weights are stored"
    return ""


def _one_node_model(
    graph: Graph, node: gs.Node, small: Sequence[gs.Constant], fed: Sequence[gs.Constant]
) -> onnx.ModelProto:
    """A model of ``node`` alone; its outputs are untyped, so that shape inference may say what they are."""
    model = onnx.ModelProto(
        ir_version=max(graph.ir_version, 4), opset_import=[onnx.helper.make_opsetid("", graph.opset)]
    )
    body = model.graph
    body.name = "node"
    body.node.append(Exporter(graph.ir_version).node(node, {}))
    body.node[0].domain = ""
    for tensor in {id(tensor): tensor for tensor in small}.values():
        body.initializer.append(onnx.numpy_helper.from_array(tensor.values, tensor.name))
    for tensor in {id(tensor): tensor for tensor in fed}.values():
        kind = onnx_dtype(tensor.dtype, f"constant '{tensor.name}'")
        body.input.append(onnx.helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape)))
    body.output.extend(onnx.ValueInfoProto(name=output.name) for output in node.outputs if not output.is_empty())
    return model


def _inferred(model: onnx.ModelProto) -> list[tuple[np.dtype[Any], tuple[int, ...]]] | None:
    """Type and shape of every output, or None if any is not known."""
    try:
        outputs = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output
    except onnx.shape_inference.InferenceError:
        return None
    found = []
    for output in outputs:
        tensor = output.type.tensor_type
        if not tensor.elem_type or not tensor.HasField("shape"):
            return None
        if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            return None
        dtype = numpy_dtype(tensor.elem_type, f"tensor '{output.name}'")
        found.append((dtype, tuple(dim.dim_value for dim in tensor.shape.dim)))
    return found


def _run(
    model: onnx.ModelProto,
    feeds: dict[str, NDArray[Any]],
    expected: Sequence[tuple[np.dtype[Any], tuple[int, ...]]],
) -> Evaluation:
    from onnx.reference import ReferenceEvaluator  # half a second: only for models that have something to fold

    try:
        # Where NumPy would divide by zero or cast out of range, runtimes differ: leave it to them.
        with np.errstate(divide="raise", invalid="raise", over="ignore", under="ignore"):
            results = ReferenceEvaluator(model).run(None, feeds)
    except Exception as error:  # the reference raises whatever NumPy does; whatever it is, the node can stay
        return Evaluation(reason=f"the reference implementation fails on it: {type(error).__name__}: {error}")
    values = tuple(np.asarray(result) for result in results)
    for value, (dtype, shape) in zip(values, expected, strict=True):
        if (value.dtype, value.shape) != (dtype, shape) and dtype != np.dtype(object):
            return Evaluation(
                reason=f"the reference implementation gives {value.dtype}{list(value.shape)}, not {dtype}{list(shape)}"
            )
    if _casts_out_of_range(model.graph, feeds, values):
        return Evaluation(reason="it casts numbers that the integer type cannot hold")
    return Evaluation(values)


def _casts_out_of_range(graph: onnx.GraphProto, feeds: dict[str, NDArray[Any]], values: Sequence[NDArray[Any]]) -> bool:
    """Out-of-range casts to integers are undefined in ONNX, and not all of them set a floating-point flag."""
    if not graph.node[0].op_type.startswith("Cast") or values[0].dtype.kind not in "iu":
        return False
    name = graph.node[0].input[0]
    source = feeds[name] if name in feeds else onnx.numpy_helper.to_array(graph.initializer[0])
    limits = np.iinfo(values[0].dtype)
    truncated = np.trunc(source.astype(np.float64))
    return not bool(np.all((truncated >= limits.min) & (truncated <= limits.max)))


def _make_constant(tensor: gs.Tensor, values: NDArray[Any] | LazyValues) -> None:
    tensor.to_constant(values)
    if isinstance(values, LazyValues):
        tensor.__class__ = StoredConstant


def _attribute_values(name: str, value: Any) -> NDArray[Any] | LazyValues | None:
    """Values of one of the attributes of Constant-13; Any: what an attribute holds depends on its name."""
    if name == "value" and isinstance(value, gs.Constant):
        return value._values
    if name == "sparse_value" and isinstance(value, onnx.SparseTensorProto):
        # Dense: sparse initializers are another type to the operators that read them.
        return StoredSparseValues(value).load()
    kinds: dict[str, Any] = {"value_float": np.float32, "value_int": np.int64, "value_string": object}
    dtype = kinds.get(name.removesuffix("s"))
    return None if dtype is None or isinstance(value, gs.Node.AttributeRef) else np.array(value, dtype)
