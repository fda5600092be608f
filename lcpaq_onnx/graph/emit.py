"""The few node patterns that quantized models are made of. Rewriting passes insert them; the cost table counts their
bytes. Both call the same functions, so a predicted size is a size on disk.

Names: the dequantized tensor keeps the original name, so consumers, graph outputs and control-flow bodies need no edit;
``t/f`` is the float value before quantization, ``t/q`` the integers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.graph_io import constant, constant_bytes, node_bytes, node_metadata
from lcpaq_onnx.graph.ops import facts_of
from lcpaq_onnx.numeric.rounding import QuantizedWeight

__all__ = [
    "BIAS_PASS",
    "PACK_PASS",
    "PASS_KEY",
    "QDQ_PASS",
    "ROUND_PASS",
    "activation_constants",
    "conversion_ends",
    "dequantize_bias",
    "dequantize_weight",
    "emitted_bytes",
    "fill_growth",
    "fills_of",
    "isolated_dequantize",
    "isolated_name",
    "made_node",
    "move_integers",
    "quantize_dequantize",
    "read_on_integers",
    "scale_weight",
    "written_on_integers",
]

PASS_KEY = "lcpaq.pass"

# Types of block-wise weights by their width.
_NARROW = {2: np.dtype(ml_dtypes.int2), 4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}

# Marks of the passes that insert the patterns: the cost table counts their bytes too. All that round share one.
ROUND_PASS = "round-weights"
BIAS_PASS = "quantize-biases"
QDQ_PASS = "insert-qdq"
PACK_PASS = "pack-weights"


def made_node(
    op: str, name: str, inputs: Sequence[gs.Tensor], output: gs.Tensor, made_by: str, **attrs: object
) -> gs.Node:
    """A node that says which pass made it."""
    node = gs.Node(op=op, name=name, attrs=dict(attrs), inputs=list(inputs), outputs=[output])
    node_metadata(node)[PASS_KEY] = made_by
    return node


def _int_dtype(format: QFormat) -> np.dtype:
    """Smallest whole-byte type that holds the format."""
    return np.dtype(f"{'' if format.signed else 'u'}int{8 if format.bits <= 8 else 16}")


def emitted_bytes(nodes: Iterable[gs.Node], *, shared: Iterable[gs.Tensor] = ()) -> int:
    """Bytes that ``nodes`` and the constants they read, other than ``shared`` ones, add to a file."""
    counted = {id(tensor) for tensor in shared}
    total = 0
    for node in nodes:
        total += node_bytes(node)
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and id(tensor) not in counted:
                counted.add(id(tensor))
                total += constant_bytes(tensor)
    return total


# ---- activations ----------------------------------------------------------------------------------------------------
def activation_constants(group: str, scale: float, zero_point: int, format: QFormat) -> tuple[gs.Constant, gs.Constant]:
    """0-d scale and explicit 0-d zero point of an activation group (shape [1] or no zero point stops fusions)."""
    return (
        constant(f"{group}/scale", np.array(scale, np.float32)),
        constant(f"{group}/zero_point", np.array(zero_point, _int_dtype(format))),
    )


def conversion_ends(name: str, *, is_input: bool) -> tuple[gs.Variable, gs.Variable]:
    """Tensors before and after the conversion of ``name``. A graph input keeps its name, and its readers move on to
    ``name/dq``; elsewhere the dequantized tensor keeps it, and the producer writes ``name/f``.
    """
    before, after = (name, f"{name}/dq") if is_input else (f"{name}/f", name)
    return gs.Variable(before), gs.Variable(after)


def quantize_dequantize(
    source: gs.Tensor, result: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor, *, name: str, made_by: str
) -> list[gs.Node]:
    """QuantizeLinear, DequantizeLinear (opset 10; 16 bit: 21) from ``source`` to ``result``; integers ``name/q``."""
    integers = gs.Variable(f"{name}/q")
    return [
        made_node("QuantizeLinear", f"{name}/Quantize", [source, scale, zero_point], integers, made_by),
        made_node("DequantizeLinear", f"{name}/Dequantize", [integers, scale, zero_point], result, made_by),
    ]


def move_integers(node: gs.Node, integers: gs.Tensor, result: gs.Tensor, zero_point: gs.Tensor) -> None:
    """Let a node that only moves values read ``integers`` and write ``result``; what it fills in is the zero point."""
    node.inputs[0] = integers
    node.outputs[0] = result
    position = facts_of(node.op, node.domain).fill_input
    if position is None:
        return
    if len(node.inputs) <= position:
        node.inputs.append(zero_point)
    else:
        node.inputs[position] = zero_point


def fills_of(node: gs.Node) -> list[gs.Constant]:
    """The constant that ``node`` fills in, if it names one."""
    position = facts_of(node.op, node.domain).fill_input
    inputs = [] if position is None else node.inputs[position : position + 1]
    return [tensor for tensor in inputs if isinstance(tensor, gs.Constant)]


def fill_growth(node: gs.Node, zero_point: str) -> int:
    """Bytes that ``move_integers`` adds to the text of ``node`` for the fill."""
    position = facts_of(node.op, node.domain).fill_input
    if position is None:
        return 0
    old = node.inputs[position].name if len(node.inputs) > position else None
    return _name_bytes(zero_point) - (0 if old is None else _name_bytes(old))


def _name_bytes(name: str) -> int:
    """Bytes of one more input in a NodeProto."""
    return int(onnx.NodeProto(input=[name]).ByteSize())


def written_on_integers(tensor: gs.Tensor, explicit: Collection[str]) -> bool:
    """Whether the node that writes ``tensor`` moves integers itself, so that nothing is left to quantize."""
    return bool(tensor.inputs) and tensor.inputs[0].name in explicit


def read_on_integers(tensor: gs.Tensor, explicit: Collection[str], *, is_output: bool) -> bool:
    """Whether all readers of ``tensor`` take its integers, so that nobody needs it dequantized."""
    return not is_output and bool(tensor.outputs) and all(node.name in explicit for node in tensor.outputs)


def isolated_name(tensor: str, layer: str) -> str:
    """Name of ``tensor`` as the float layer ``layer`` alone reads it."""
    return f"{tensor}/{layer}"


def isolated_dequantize(
    integers: gs.Tensor,
    result: gs.Tensor,
    scale: float,
    zero_point: int,
    channels: int,
    format: QFormat,
    made_by: str,
    *,
    axis: int = 1,
) -> gs.Node:
    """A DequantizeLinear-13 whose scale is a vector of equal values along ``axis``: the same numbers, but ONNX
    Runtime's WeightBiasQuantization does not match it, so a float layer behind it keeps its float weights.
    """
    name = result.name
    scales = constant(f"{name}/scale", np.full(channels, scale, np.float32))
    zeros = constant(f"{name}/zero_point", np.full(channels, zero_point, _int_dtype(format)))
    return made_node("DequantizeLinear", f"{name}/Dequantize", [integers, scales, zeros], result, made_by, axis=axis)


# ---- weights --------------------------------------------------------------------------------------------------------
def dequantize_weight(weight: QuantizedWeight, result: gs.Tensor, made_by: str) -> gs.Node:
    """DequantizeLinear of integer constants to ``result``. Per channel or tensor (opset 13): int8, or int16, with the
    zero point written out. Block-wise (opset 21; 2 bits: 25): the type of their width, and no zero point, which no
    kernel for blocks needs and which would take a thirtieth of them.
    """
    if weight.format.block is not None:
        return _dequantize_blocks(weight, result, made_by)
    name = result.name
    zeros = np.zeros(weight.scale.shape, weight.integers.dtype)
    inputs = [
        constant(f"{name}/q", weight.integers),
        constant(f"{name}/scale", weight.scale),
        constant(f"{name}/zero_point", zeros),
    ]
    attrs = {} if weight.format.axis is None else {"axis": weight.format.axis}
    return made_node("DequantizeLinear", f"{name}/Dequantize", inputs, result, made_by, **attrs)


def _dequantize_blocks(weight: QuantizedWeight, result: gs.Tensor, made_by: str) -> gs.Node:
    name, format = result.name, weight.format
    assert format.axis is not None
    inputs = [
        constant(f"{name}/q", weight.integers.astype(_NARROW[format.bits])),
        constant(f"{name}/scale", weight.scale),
    ]
    attrs = {"axis": format.axis, "block_size": format.block}
    return made_node("DequantizeLinear", f"{name}/Dequantize", inputs, result, made_by, **attrs)


def scale_weight(weight: QuantizedWeight, result: gs.Tensor, made_by: str) -> list[gs.Node]:
    """Cast and Mul of integer constants to ``result``: weight-only storage. Runtimes fold this into a float constant at
    load, where a DequantizeLinear would run at every inference.
    """
    name, ndim = result.name, weight.integers.ndim
    scale = weight.scale
    if weight.format.axis is not None:
        shape = [1] * ndim
        shape[weight.format.axis] = -1
        scale = scale.reshape(shape)
    floats = gs.Variable(f"{name}/f")
    return [
        made_node(
            "Cast", f"{name}/Cast", [constant(f"{name}/q", weight.integers)], floats, made_by, to=onnx.TensorProto.FLOAT
        ),
        made_node("Mul", f"{name}/Scale", [floats, constant(f"{name}/scale", scale)], result, made_by),
    ]


def dequantize_bias(
    integers: NDArray[np.int32], scale: NDArray[np.float32], result: gs.Tensor, made_by: str
) -> gs.Node:
    """DequantizeLinear of int32 biases; ``scale`` must be exactly float32(input scale × weight scale) to fuse."""
    name = result.name
    attrs = {"axis": 0} if scale.ndim else {}
    inputs = [constant(f"{name}/q", integers), constant(f"{name}/scale", scale)]
    return made_node("DequantizeLinear", f"{name}/Dequantize", inputs, result, made_by, **attrs)
