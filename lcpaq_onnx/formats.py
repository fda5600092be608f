"""Number formats: of one tensor (``QFormat``) and of one layer (``LayerFormat``). Both have a text form."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lcpaq_onnx.errors import UsageError

__all__ = ["FLOAT_LAYER", "LayerFormat", "QFormat"]

_QFORMAT = re.compile(r"(?P<sign>u?)int(?P<bits>\d+):(?P<sym>sym|asym)(:axis=(?P<axis>-?\d+))?(:block=(?P<block>\d+))?")
_LAYER = re.compile(r"w(?P<weight>\d+)(b(?P<block>\d+)|a(?P<activation>\d+))?")


@dataclass(frozen=True, kw_only=True)
class QFormat:
    """Integer format of one tensor. Text form ``int4:sym:axis=0``, ``uint8:asym``, ``int4:sym:axis=1:block=32``.

    ``axis`` is the channel axis of a per-channel scale (None: one scale for the tensor); ``block`` the number of
    elements along ``axis`` that share a scale (ONNX DequantizeLinear-21).
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise UsageError(f"format of {self.bits} bits", hint="use 2 to 16 bits")
        if self.block is not None and self.axis is None:
            raise UsageError("a block-wise format needs an axis", hint="write e.g. int4:sym:axis=1:block=32")
        if self.block is not None and self.block < 1:
            raise UsageError(f"blocks of {self.block}", hint="use 1 element or more, e.g. int4:sym:axis=1:block=32")

    @property
    def qmin(self) -> int:
        """Least integer. Symmetric formats of 8 bits and more leave out -2**(bits-1), which integer kernels may not
        negate; narrower ones are widened before they reach a kernel and cannot spare a level.
        """
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric and self.bits >= 8 else 0)

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of ``shape``: [] without an axis, [channels], or block-wise ``shape`` with the
        axis divided by the block (ceiling).
        """
        if self.axis is None:
            return ()
        if self.block is None:
            return (shape[self.axis],)
        blocks = list(shape)
        blocks[self.axis] = -(-shape[self.axis] // self.block)
        return tuple(blocks)

    def __str__(self) -> str:
        text = f"{'' if self.signed else 'u'}int{self.bits}:{'sym' if self.symmetric else 'asym'}"
        text += "" if self.axis is None else f":axis={self.axis}"
        return text + ("" if self.block is None else f":block={self.block}")

    @classmethod
    def parse(cls, text: str) -> QFormat:
        """Inverse of ``str``. Raises UsageError on anything else."""
        match = _QFORMAT.fullmatch(text)
        if match is None:
            raise UsageError(f"'{text}' is not a tensor format", hint="write e.g. int4:sym:axis=0 or uint8:asym")
        axis, block = match["axis"], match["block"]
        return cls(
            bits=int(match["bits"]),
            signed=not match["sign"],
            symmetric=match["sym"] == "sym",
            axis=None if axis is None else int(axis),
            block=None if block is None else int(block),
        )


@dataclass(frozen=True, order=True)
class LayerFormat:
    """What one layer runs in. Text form ``w4a8``, ``w8a16``, ``w4`` (weight only, float compute), ``w4b32`` (weight
    only, a scale for each block of 32 that are summed over), ``f32``.

    ``weight_bits`` are *stored* bits; what the kernel executes is the target's business (``Target.executed``).
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.weight_bits is None and self.activation_bits is not None:
            raise UsageError("a layer with float weights has no activation format", hint="use f32, w8 or w8a8")
        if self.block is not None and (self.weight_bits is None or self.activation_bits is not None):
            raise UsageError("blocks are for weights alone", hint="write e.g. w4b32")
        if self.block is not None and self.block < 1:
            raise UsageError(f"blocks of {self.block}", hint="use 1 element or more, e.g. w4b32")

    @property
    def is_float(self) -> bool:
        return self.weight_bits is None

    @property
    def is_weight_only(self) -> bool:
        return self.weight_bits is not None and self.activation_bits is None

    @property
    def is_folded(self) -> bool:
        """Weight only and restored to float once, when the file is loaded; block-wise weights stay as they are."""
        return self.is_weight_only and self.block is None

    @property
    def stored(self) -> str:
        """What lies in the file, whatever the activations: ``w4``, ``w4b32``, ``f32``."""
        if self.weight_bits is None:
            return "f32"
        return f"w{self.weight_bits}" + ("" if self.block is None else f"b{self.block}")

    def __str__(self) -> str:
        return self.stored + ("" if self.activation_bits is None else f"a{self.activation_bits}")

    @classmethod
    def parse(cls, text: str) -> LayerFormat:
        """Inverse of ``str``. Raises UsageError on anything else."""
        if text == "f32":
            return FLOAT_LAYER
        match = _LAYER.fullmatch(text)
        if match is None:
            raise UsageError(f"'{text}' is not a layer format", hint="write e.g. w4a8, w8a16, w4, w4b32 or f32")
        activation, block = match["activation"], match["block"]
        return cls(
            int(match["weight"]),
            None if activation is None else int(activation),
            None if block is None else int(block),
        )


FLOAT_LAYER = LayerFormat()
