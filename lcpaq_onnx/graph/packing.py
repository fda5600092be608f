"""Packed storage of integers below 8 bits: the constants, and the expression that runtimes fold to int8 at load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from lcpaq_onnx.graph.emit import PASS_KEY, made_node
from lcpaq_onnx.graph.graph_io import constant, node_metadata

__all__ = [
    "empty_planes",
    "pack_planes",
    "padded_count",
    "restore_piece",
    "split_pieces",
    "unpack_blob",
    "unpack_cast",
    "unpack_planes",
]

_Plane = TypeVar("_Plane")

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
    nodes = unpack_planes([constant(f"{_prefix(bits)}/plane{w}", p) for w, p in _by_width(bits, planes)], bits, made_by)
    chunks: list[gs.Tensor] = [nodes[-1].outputs[0]]
    if len(pieces) > 1:
        nodes.append(split_pieces(chunks[0], bits, [(tensor.name, shape) for tensor, shape in pieces], made_by))
        chunks = list(nodes[-1].outputs)
    for (tensor, shape), chunk in zip(pieces, chunks, strict=True):
        nodes += restore_piece(chunk, tensor, shape, made_by)
    return nodes


def unpack_planes(planes: Sequence[gs.Tensor], bits: int, made_by: str) -> list[gs.Node]:
    """The part of ``unpack_blob`` from ``planes`` to all integers of one width, the last node's output."""
    prefix = _prefix(bits)
    nodes: list[gs.Node] = []

    def step(op: str, name: str, inputs: Sequence[gs.Tensor], **attrs: object) -> gs.Variable:
        output = gs.Variable(f"{prefix}/{name}")
        nodes.append(made_node(op, output.name, inputs, output, made_by, **attrs))
        return output

    flat = constant(f"{prefix}/flat", np.array([-1], np.int64))
    total: gs.Tensor | None = None
    remaining = bits
    for width, plane in _by_width(bits, planes):
        remaining -= width
        shifts = constant(f"{prefix}/shift{width}", np.arange(0, 8, width, dtype=np.uint8))
        field = step("BitShift", f"lanes{width}", [plane, shifts], direction="RIGHT")
        field = step("Mod", f"field{width}", [field, constant(f"{prefix}/mod{width}", np.array(1 << width, np.uint8))])
        field = step("Reshape", f"flat{width}", [field, flat])
        if remaining:
            up = constant(f"{prefix}/up{width}", np.array(1 << remaining, np.uint8))
            field = step("Mul", f"high{width}", [field, up])
        total = field if total is None else step("Add", f"sum{width}", [total, field])
    assert total is not None
    signed = step("Cast", "cast", [total], to=onnx.TensorProto.INT8)
    step("Sub", "signed", [signed, constant(f"{prefix}/offset", np.array(1 << (bits - 1), np.int8))])
    return nodes


def split_pieces(
    integers: gs.Tensor, bits: int, pieces: Sequence[tuple[str, tuple[int, ...]]], made_by: str
) -> gs.Node:
    """The part of ``unpack_blob`` that cuts ``integers`` into one chunk for each piece (name and shape)."""
    prefix = _prefix(bits)
    padded = [padded_count(shape) for _, shape in pieces]
    split = gs.Node("Split", f"{prefix}/split", inputs=[integers, constant(f"{prefix}/counts", np.array(padded))])
    split.outputs = [gs.Variable(f"{name}/flat") for name, _ in pieces]
    node_metadata(split)[PASS_KEY] = made_by
    return split


def restore_piece(chunk: gs.Tensor, tensor: gs.Tensor, shape: tuple[int, ...], made_by: str) -> list[gs.Node]:
    """The part of ``unpack_blob`` from one padded chunk to the weight itself."""
    nodes = []
    count = int(np.prod(shape, dtype=np.int64))
    if count != padded_count(shape):
        ends = [constant(f"{tensor.name}/{name}", np.array([n])) for name, n in (("begin", 0), ("end", count))]
        cut = gs.Variable(f"{tensor.name}/cut")
        nodes.append(made_node("Slice", cut.name, [chunk, *ends], cut, made_by))
        chunk = cut
    dims = constant(f"{tensor.name}/shape", np.array(shape, np.int64))
    return [*nodes, made_node("Reshape", f"{tensor.name}/Reshape", [chunk, dims], tensor, made_by)]


def padded_count(shape: tuple[int, ...]) -> int:
    """Values that a weight takes among packed ones: whole bytes of the narrowest plane."""
    return -(-int(np.prod(shape, dtype=np.int64)) // 8) * 8


def _prefix(bits: int) -> str:
    return f"lcpaq/int{bits}"


def _by_width(bits: int, planes: Sequence[_Plane]) -> Iterable[tuple[int, _Plane]]:
    return zip(_widths(bits), planes, strict=True)
