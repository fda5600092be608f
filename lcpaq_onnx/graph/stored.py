"""How a weight stands in a file, recognised from its nodes and types alone (the inverse of ``emit``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.written import WrittenConstant, WrittenModel, WrittenNode

__all__ = ["StoredWeight", "stored_weight"]

_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16}
_FLOATS = frozenset(["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"])


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """``bits``: width in the file. ``with_scale_only``: Cast and Mul instead of a DequantizeLinear. ``axis``: the
    DequantizeLinear's, counted from the front; ``block``: its ``block_size``. ``integers``: the plain constant, None
    where it is packed.
    """

    storage: Literal["float", "plain", "cast", "packed-bytes"]
    bits: int
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...] = ()
    axis: int = 0
    block: int | None = None
    with_scale_only: bool = False
    has_zero_point: bool = False
    integers: WrittenConstant | None = None

    def __str__(self) -> str:
        return "float" if self.storage == "float" else f"{self.bits} bits {self.storage}"

    def has_scales_of(self, format: QFormat) -> bool:
        """Whether there is one scale per index of the format's axis, or per block along it (no axis: one in all)."""
        if format.axis is None:
            return not self.scale_shape
        axis = format.axis % len(self.shape)
        if self.block != format.block:
            return False
        if format.block is not None:
            return self.axis == axis and self.scale_shape == format.scale_shape(self.shape)
        if self.with_scale_only:
            return self.scale_shape == tuple(n if i == axis else 1 for i, n in enumerate(self.shape))
        return self.axis == axis and self.scale_shape == (self.shape[axis],)

    def fits(self, low: int, high: int) -> bool:
        """Whether all plainly stored integers lie in [low, high]; reads them."""
        if self.integers is None:
            return False
        values = self.integers.values
        return bool(values.min(initial=low) >= low and values.max(initial=high) <= high)


@dataclass(frozen=True, eq=False)
class _Integers:
    storage: Literal["plain", "cast", "packed-bytes"]
    bits: int
    shape: tuple[int, ...]
    constant: WrittenConstant | None = None


def stored_weight(model: WrittenModel, weight: str) -> StoredWeight | None:
    """How the weight tensor ``weight`` is stored; None where it is in no way that ``emit`` writes."""
    constant = model.constants.get(weight)
    if constant is not None:
        return StoredWeight("float", 32, constant.shape) if constant.dtype in _FLOATS else None
    node = model.producers.get(weight)
    if node is None:
        return _looked_up(model, weight)
    if node.op not in ("DequantizeLinear", "Mul"):
        return None
    with_scale_only = node.op == "Mul"
    source = node.inputs[0]
    if with_scale_only:
        cast = model.producers.get(source)
        if cast is None or cast.op != "Cast":
            return None
        source = cast.inputs[0]
    integers, scale = _integers(model, source), model.constants.get(node.inputs[1])
    if integers is None or scale is None:
        return None
    return StoredWeight(
        storage=integers.storage,
        bits=integers.bits,
        shape=integers.shape,
        scale_shape=scale.shape,
        axis=_axis(node, len(integers.shape)),
        block=_integer(node, "block_size", 0) or None,
        with_scale_only=with_scale_only,
        has_zero_point=len(node.inputs) > 2 and node.inputs[2] in model.constants,
        integers=integers.constant,
    )


def _looked_up(model: WrittenModel, weight: str) -> StoredWeight | None:
    """A table whose rows are picked as integers and scaled behind, so that nothing restores it as a whole."""
    integers, scale = _integers(model, f"{weight}/q"), model.constants.get(f"{weight}/scale")
    if integers is None or scale is None:
        return None
    return StoredWeight(
        storage=integers.storage,
        bits=integers.bits,
        shape=integers.shape,
        scale_shape=scale.shape,
        with_scale_only=True,
        integers=integers.constant,
    )


def _integers(model: WrittenModel, name: str) -> _Integers | None:
    constant = model.constants.get(name)
    if constant is not None:
        bits = _BITS.get(constant.dtype)
        return None if bits is None else _Integers("plain", bits, constant.shape, constant)
    node = model.producers.get(name)
    if node is None:
        return None
    source = model.constants.get(node.inputs[0])
    if node.op == "Cast" and source is not None and source.dtype in _BITS:
        return _Integers("cast", _BITS[source.dtype], source.shape)
    dims = model.constants.get(node.inputs[1]) if node.op == "Reshape" else None
    bits = _plane_bits(model, node) if dims is not None else 0
    if dims is None or not bits:
        return None
    return _Integers("packed-bytes", bits, tuple(int(extent) for extent in dims.values))


def _plane_bits(model: WrittenModel, node: WrittenNode) -> int:
    """Widths of all bit planes that flow into ``node``, added up: each is the remainder (Mod) of shifted bytes."""
    seen: set[str] = set()
    bits, pending = 0, list(node.inputs)
    while pending:
        name = pending.pop()
        producer = model.producers.get(name)
        if name in seen or producer is None:
            continue
        seen.add(name)
        pending += producer.inputs
        modulus = model.constants.get(producer.inputs[1]) if producer.op == "Mod" else None
        if modulus is not None:
            bits += int(np.log2(modulus.values.astype(np.float64).max()))
    return bits


def _axis(node: WrittenNode, ndim: int) -> int:
    """Axis attribute of DequantizeLinear-13 (default 1), counted from the front."""
    axis = _integer(node, "axis", 1)
    return axis % ndim if ndim else 0


def _integer(node: WrittenNode, attribute: str, default: int) -> int:
    value = node.attributes.get(attribute, default)
    assert isinstance(value, int)
    return value
