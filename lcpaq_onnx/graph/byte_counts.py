"""Bytes of the patterns that rewriting inserts, counted on the very nodes; asked for again by every format that shares
them, so that each is counted once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx_graphsurgeon as gs

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph import emit, packing
from lcpaq_onnx.graph.graph_io import constant, constant_bytes
from lcpaq_onnx.numeric.rounding import QuantizedWeight

__all__ = [
    "DUMMIES",
    "blob_bytes",
    "conversion_pair_bytes",
    "integer_bias_bytes",
    "isolated_bytes",
    "packed_bytes",
    "stand_in",
    "weight_bytes",
]

_KEPT_COUNTS = 1 << 14

# Two pieces make the Split that any more share; the third shows what one piece adds.
DUMMIES = (("a/q", (8,)), ("b/q", (8,)), ("c/q", (8,)))


def stand_in(name: str) -> str:
    """A name of the same length, which is all that counts: repeated blocks of a network then share their counts."""
    return "x" * len(name.encode())


@lru_cache(maxsize=_KEPT_COUNTS)
def weight_bytes(name: str, shape: tuple[int, ...], format: QFormat, storage: str, with_scale_only: bool) -> int:
    """Bytes of a quantized weight and of the nodes that restore it, without shared packed constants."""
    if format.block is not None:
        return _block_bytes(name, shape, format)
    is_wide = format.bits > 8
    total = _restoring_bytes(name, shape, format.axis, is_wide, with_scale_only)
    if storage == "plain":
        return total + _integer_bytes(name, shape, is_wide)
    return total + (_cast_bytes(name, shape, format.bits) if storage == "cast" else 0)


@lru_cache(maxsize=_KEPT_COUNTS)
def _restoring_bytes(name: str, shape: tuple[int, ...], axis: int | None, is_wide: bool, with_scale_only: bool) -> int:
    """Bytes of the nodes from integers to the weight, with scale and zero point."""
    scale = np.ones(() if axis is None else shape[axis], np.float32)
    zeros = np.zeros(shape, np.int16 if is_wide else np.int8)
    weight = QuantizedWeight(zeros, scale, QFormat(bits=16 if is_wide else 8, axis=axis))
    result = gs.Variable(name)
    if with_scale_only:
        nodes = emit.scale_weight(weight, result, emit.ROUND_PASS)
    else:
        nodes = [emit.dequantize_weight(weight, result, emit.ROUND_PASS)]
    return emit.emitted_bytes(nodes, shared=[nodes[0].inputs[0]])


def _block_bytes(name: str, shape: tuple[int, ...], format: QFormat) -> int:
    """Bytes of a block-wise weight with its DequantizeLinear."""
    scale = np.ones(format.scale_shape(shape), np.float32)
    weight = QuantizedWeight(np.zeros(shape, np.int8), scale, format)
    return emit.emitted_bytes([emit.dequantize_weight(weight, gs.Variable(name), emit.ROUND_PASS)])


@lru_cache(maxsize=_KEPT_COUNTS)
def _integer_bytes(name: str, shape: tuple[int, ...], is_wide: bool) -> int:
    return constant_bytes(constant(f"{name}/q", np.zeros(shape, np.int16 if is_wide else np.int8)))


@lru_cache(maxsize=_KEPT_COUNTS)
def _cast_bytes(name: str, shape: tuple[int, ...], bits: int) -> int:
    integers = gs.Variable(f"{name}/q")
    return emit.emitted_bytes([packing.unpack_cast(np.zeros(shape, np.int8), bits, integers, emit.PACK_PASS)])


@lru_cache(maxsize=_KEPT_COUNTS)
def integer_bias_bytes(name: str, shape: tuple[int, ...], *, is_per_channel: bool) -> int:
    """Bytes of an int32 bias and its DequantizeLinear."""
    scale = np.ones(shape if is_per_channel else (), np.float32)
    node = emit.dequantize_bias(np.zeros(shape, np.int32), scale, gs.Variable(name), emit.BIAS_PASS)
    return emit.emitted_bytes([node])


@lru_cache(maxsize=_KEPT_COUNTS)
def conversion_pair_bytes(name: str, scale: str, zero_point: str, is_input: bool) -> tuple[int, int]:
    """Bytes of QuantizeLinear and of DequantizeLinear of one tensor, without their constants."""
    source, result = emit.conversion_ends(name, is_input=is_input)
    constants = gs.Variable(scale), gs.Variable(zero_point)
    pair = emit.quantize_dequantize(source, result, *constants, name=name, made_by=emit.QDQ_PASS)
    return emit.emitted_bytes(pair[:1]), emit.emitted_bytes(pair[1:])


@lru_cache(maxsize=_KEPT_COUNTS)
def isolated_bytes(integers: str, result: str, channels: int, format: QFormat, axis: int) -> int:
    """Bytes of a DequantizeLinear for one float layer."""
    ends = gs.Variable(integers), gs.Variable(result)
    return emit.emitted_bytes([emit.isolated_dequantize(*ends, 1.0, 0, channels, format, emit.QDQ_PASS, axis=axis)])


@lru_cache(maxsize=_KEPT_COUNTS)
def packed_bytes(bits: int, name: str, shape: tuple[int, ...]) -> int:
    """Bytes that one more weight adds to ``blob_bytes``, but for length prefixes that grow with their number."""
    others = DUMMIES[:2]
    return blob_bytes(bits, (*others, (name, shape))) - blob_bytes(bits, others)


def blob_bytes(bits: int, pieces: tuple[tuple[str, tuple[int, ...]], ...]) -> int:
    """Bytes of the expression that unpacks ``pieces`` (name and shape of each weight) of one width."""
    values = sum(packing.padded_count(shape) for _, shape in pieces)
    planes = [constant(_PLANE, plane) for plane in packing.empty_planes(values, bits)]
    total = _unpacking_bytes(bits) + sum(constant_bytes(plane) for plane in planes)
    if len(pieces) == 1:
        ((name, shape),) = pieces
        return total + _piece_bytes(name, shape, packing.unpack_planes(planes, bits, "")[-1].outputs[0].name)
    names = tuple(stand_in(name) for name, _ in pieces)
    return total + _split_bytes(names) + sum(_piece_bytes(stand_in(name), shape) for name, shape in pieces)


# What stands for a plane: all have names of this length.
_PLANE = "lcpaq/int8/plane8"


@lru_cache(maxsize=_KEPT_COUNTS)
def _unpacking_bytes(bits: int) -> int:
    """Bytes of the part that all pieces share, without planes."""
    planes = [gs.Variable(_PLANE) for _ in packing.empty_planes(0, bits)]
    return emit.emitted_bytes(packing.unpack_planes(planes, bits, emit.PACK_PASS))


@lru_cache(maxsize=_KEPT_COUNTS)
def _split_bytes(names: tuple[str, ...]) -> int:
    """Bytes of the Split; neither extents nor the width, a digit, matter."""
    integers = packing.unpack_planes([gs.Variable(_PLANE)], 4, emit.PACK_PASS)[-1].outputs[0]
    return emit.emitted_bytes([packing.split_pieces(integers, 4, [(name, (8,)) for name in names], emit.PACK_PASS)])


@lru_cache(maxsize=_KEPT_COUNTS)
def _piece_bytes(name: str, shape: tuple[int, ...], chunk: str | None = None) -> int:
    """Bytes from the chunk, one of a Split if not named, to the weight."""
    ends = gs.Variable(chunk or f"{name}/flat"), gs.Variable(name)
    return emit.emitted_bytes(packing.restore_piece(*ends, shape, emit.PACK_PASS))
