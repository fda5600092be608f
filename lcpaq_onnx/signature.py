"""What determines an operator's run time: its name, shapes and attributes, as one value with an exact-match key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["KINDS", "Kind", "OperatorSignature", "kinds_of"]

Kind = Literal[
    "conv", "depthwise", "pointwise", "matmul", "gemm", "convtranspose", "elementwise", "pool", "movement", "other"
]
KINDS: tuple[Kind, ...] = (
    *("conv", "depthwise", "pointwise", "matmul", "gemm", "convtranspose"),
    *("elementwise", "pool", "movement", "other"),
)

_ELEMENTWISE: tuple[Kind, ...] = ("elementwise",)
_POOL: tuple[Kind, ...] = ("pool",)
_MOVEMENT: tuple[Kind, ...] = ("movement",)

# Of an activation and of a weight; n-bit weights carry a float32 scale for each block of 32.
_BYTES_PER_ELEMENT = {
    "f32": (4.0, 4.0),
    "f16": (2.0, 2.0),
    "int16": (2.0, 2.0),
    "int8": (1.0, 1.0),
    "int4": (0.5, 0.5),
    **{f"nbits{bits}": (4.0, bits / 8 + 4 / 32) for bits in (2, 4, 8)},
}

# Operators by how their time scales; whatever is missing is "other" (normalisations, recurrent cells, Softmax, …).
_KINDS_OF: Mapping[str, tuple[Kind, ...]] = {
    "Conv": ("conv", "depthwise", "pointwise"),
    "ConvTranspose": ("convtranspose",),
    "Gemm": ("gemm",),
    "MatMul": ("matmul",),
    **dict.fromkeys(
        ["Abs", "Add", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish"], _ELEMENTWISE
    ),
    **dict.fromkeys(["LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow"], _ELEMENTWISE),
    **dict.fromkeys(["Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh", "Where"], _ELEMENTWISE),
    **dict.fromkeys(["AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"], _POOL),
    **dict.fromkeys(["ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"], _POOL),
    **dict.fromkeys(["Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad"], _MOVEMENT),
    **dict.fromkeys(["Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze"], _MOVEMENT),
    **dict.fromkeys(["Tile", "Transpose", "Unsqueeze"], _MOVEMENT),
}


def kinds_of(op: str) -> tuple[Kind, ...]:
    """Kinds that nodes of operator ``op`` can have; Conv has three, most have one."""
    return _KINDS_OF.get(op, ("other",))


@dataclass(frozen=True)
class OperatorSignature:
    """One node at the shapes it runs with. Counts are per inference at those shapes, batch included.

    ``macs``: multiply-accumulates of the weighted kinds, 0 for all others. ``input_elements``: of all non-constant
    inputs. ``weight_elements``: of all constant inputs (weight and bias). ``detail``: shapes and attributes, e.g.
    ``64x56x56 k3x3 s1x1 d1x1 g1 -> 64x56x56``; a batch other than 1 stands in front as ``b8``.
    """

    op: str
    kind: Kind
    macs: int
    input_elements: int
    output_elements: int
    weight_elements: int
    detail: str

    @property
    def key(self) -> str:
        """Exact-match key of latency tables."""
        return f"{self.op} {self.detail}"

    @property
    def work(self) -> int:
        """Multiply-accumulates; where there are none, elements read and written."""
        return self.macs or self.input_elements + self.output_elements

    def bytes(self, executed: str) -> float:
        """Memory traffic when every operand is read or written once, in the executed format."""
        activation, weight = _BYTES_PER_ELEMENT[executed]
        return (self.input_elements + self.output_elements) * activation + self.weight_elements * weight
