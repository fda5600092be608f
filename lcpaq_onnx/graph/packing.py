"""Packed storage of integers below 8 bits: the constants, and the expression that runtimes fold to int8 at load."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.emit import PASS_KEY, made_node
from lcpaq_onnx.graph.graph_io import constant, node_metadata

__all__ = ["empty_planes", "pack_planes", "unpack_blob", "unpack_cast"]

_PLANES = (4, 2, 1)
"""Widths of bit planes: every width from 2 to 7 is a sum of distinct ones, and each divides a byte."""


def unpack_cast(integers: NDArray[np.int8], bits: int, result: gs.Tensor, made_by: str) -> gs.Node:
    """Cast of int4 (opset 21) or int2 (opset 25) constants to int8; constant folding runs it once, at load."""
    narrow = {4: ml_dtypes.int4, 2: ml_dtypes.int2}[bits]
    stored = constant(f"{result.name}{bits}", integers.astype(narrow))
    return made_node("Cast", f"{result.name}/Cast", [stored], result, made_by, to=onnx.TensorProto.INT8)


def pack_planes(integers: NDArray[np.int8], bits: int) -> list[NDArray[np.uint8]]:
    """Bit planes of flat ``integers`` (a multiple of 8 of them), most significant plane first.

    Value + 2**(bits-1) is split into fields of 4, 2 and 1 bits; each plane is [n·width/8, 1] bytes with consecutive
    values in rising bit positions.
    """
    rest = (integers.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    planes = []
    remaining = bits
    for width in _widths(bits):
        remaining -= width
        field = (rest >> remaining) & ((1 << width) - 1)
        lanes = field.reshape(-1, 8 // width) << np.arange(0, 8, width, dtype=np.uint8)
        planes.append(np.bitwise_or.reduce(lanes, axis=1, keepdims=True).astype(np.uint8))
    return planes


def empty_planes(values: int, bits: int) -> list[NDArray[np.uint8]]:
    """Planes of the shapes that ``pack_planes`` makes of ``values`` integers."""
    return [np.zeros((values * width // 8, 1), np.uint8) for width in _widths(bits)]


def _widths(bits: int) -> list[int]:
    return [width for width in _PLANES if bits & width]


def unpack_blob(
    planes: Sequence[NDArray[np.uint8]], bits: int, pieces: Sequence[tuple[gs.Tensor, tuple[int, ...]]], made_by: str
) -> list[gs.Node]:
    """One expression that unpacks every weight of one width from bytes (opset 14), folded once, at load.

    ``planes``: as ``pack_planes`` makes them, of all weights back to back, each padded to a multiple of 8 values.
    ``pieces``: result tensor (int8) and shape of each weight, in the same order.
    """
    prefix = f"lcpaq/int{bits}"
    nodes: list[gs.Node] = []

    def step(op: str, name: str, inputs: Sequence[gs.Tensor], **attrs: object) -> gs.Variable:
        output = gs.Variable(f"{prefix}/{name}")
        nodes.append(made_node(op, output.name, inputs, output, made_by, **attrs))
        return output

    flat = constant(f"{prefix}/flat", np.array([-1], np.int64))
    total: gs.Tensor | None = None
    remaining = bits
    for width, plane in zip(_widths(bits), planes, strict=True):
        remaining -= width
        shifts = constant(f"{prefix}/shift{width}", np.arange(0, 8, width, dtype=np.uint8))
        field = step(
            "BitShift", f"lanes{width}", [constant(f"{prefix}/plane{width}", plane), shifts], direction="RIGHT"
        )
        field = step("Mod", f"field{width}", [field, constant(f"{prefix}/mod{width}", np.array(1 << width, np.uint8))])
        field = step("Reshape", f"flat{width}", [field, flat])
        if remaining:
            up = constant(f"{prefix}/up{width}", np.array(1 << remaining, np.uint8))
            field = step("Mul", f"high{width}", [field, up])
        total = field if total is None else step("Add", f"sum{width}", [total, field])
    assert total is not None
    signed = step("Cast", "cast", [total], to=onnx.TensorProto.INT8)
    signed = step("Sub", "signed", [signed, constant(f"{prefix}/offset", np.array(1 << (bits - 1), np.int8))])
    counts = [int(np.prod(shape, dtype=np.int64)) for _, shape in pieces]
    padded = [-(-count // 8) * 8 for count in counts]
    chunks = [signed]
    if len(pieces) > 1:
        chunks = [gs.Variable(f"{tensor.name}/flat") for tensor, _ in pieces]
        split = gs.Node("Split", f"{prefix}/split", inputs=[signed, constant(f"{prefix}/counts", np.array(padded))])
        split.outputs = chunks
        node_metadata(split)[PASS_KEY] = made_by
        nodes.append(split)
    for (tensor, shape), chunk, count, size in zip(pieces, chunks, counts, padded, strict=True):
        if count != size:
            ends = [constant(f"{tensor.name}/{name}", np.array([n])) for name, n in (("begin", 0), ("end", count))]
            cut = gs.Variable(f"{tensor.name}/cut")
            nodes.append(made_node("Slice", cut.name, [chunk, *ends], cut, made_by))
            chunk = cut
        dims = constant(f"{tensor.name}/shape", np.array(shape, np.int64))
        nodes.append(made_node("Reshape", f"{tensor.name}/Reshape", [chunk, dims], tensor, made_by))
    return nodes
