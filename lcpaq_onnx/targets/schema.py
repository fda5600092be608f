"""The parts of a target descriptor: frozen models that reject unknown keys. See docs/targets.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.signature import Kind

__all__ = [
    "EXECUTED_BITS",
    "MODE",
    "Executed",
    "FormatRates",
    "FrozenModel",
    "Memory",
    "OperatorRule",
    "Quirk",
    "Rates",
    "Runtime",
    "StorageRule",
    "TensorFormat",
    "Weights",
]

Executed = Literal["f32", "f16", "int16", "int8", "int4", "nbits2", "nbits4", "nbits8"]
# One flat Literal: a union would show up in the locations of pydantic's errors.
LayerMode = Literal["f32", "f16", "int16", "int8", "int4", "nbits", "illegal"]
MODE = re.compile(r"weight-only(-b(?P<block>\d+))?|a\d+")

EXECUTED_BITS: Mapping[str, int] = MappingProxyType(
    {"f32": 32, "f16": 16, "int16": 16, "int8": 8, "int4": 4, "nbits2": 8, "nbits4": 8, "nbits8": 8}
)
"""Bits of the products. A kernel for n-bit blocks (``nbits…``) widens them to 8 bits and rounds its float input to
8 bits, block by block, while it runs."""

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bits = Annotated[int, Field(ge=2, le=16)]


def _parse_format(text: object) -> QFormat:
    if not isinstance(text, str):
        raise ValueError("must be a text such as uint8:asym")
    try:
        return QFormat.parse(text)
    except UsageError as error:
        raise ValueError(error.message) from error


TensorFormat = Annotated[QFormat, PlainValidator(_parse_format), PlainSerializer(str, return_type=str)]


class Quirk(str, Enum):
    """Behaviour of a runtime that a correct file must work around."""

    REQUANTIZES_FLOAT_LAYERS = "float-layer-between-qdq-is-requantized"
    """A float layer whose input comes from DequantizeLinear and whose output goes to QuantizeLinear has its weights
    quantized to int8 silently."""
    INT2_DEQUANTIZE_CRASHES = "int8-activations-with-int2-weights-crash"
    """DequantizeLinear on int2 weights beside 8-bit activations fails at load; cast them to int8 first."""
    BLOCKWISE_CONV_CRASHES = "int8-activations-with-blockwise-conv-crash"
    EXPLICIT_ZERO_POINT = "explicit-zero-point-required"
    """Without a zero-point input on every Q and DQ, kernels do not fuse or results are wrong."""
    SCALAR_SCALE = "scalar-activation-scale-required"
    """A per-tensor scale of shape [1] instead of [] does not fuse or does not load."""
    OUTPUT_QUANTIZER = "integer-kernel-needs-output-quantizer"
    """Without QuantizeLinear behind it, an operator runs in float although its inputs are integers."""
    EXACT_BIAS_SCALE = "bias-scale-must-be-exact-product"
    """The int32 bias scale must equal float32(input scale * weight scale) bit for bit."""
    MATMUL_ADD_BECOMES_GEMM = "matmul-add-becomes-gemm"
    """A MatMul of two matrices and the Add of a constant behind it become one Gemm before kernels are chosen; with a
    float bias it runs in float. A quantizer between the two keeps them apart."""
    RELU_AT_QMIN = "relu-fuses-only-at-zero-point-qmin"
    """A Relu before QuantizeLinear disappears only if the zero point is the least integer."""
    WEIGHT_DEQUANTIZE_EACH_RUN = "weight-only-dequantize-runs-every-inference"
    """Weight-only layers must be written Cast, Mul (folded at load), not DequantizeLinear."""
    GATHER_DEQUANTIZES_TABLE = "gather-dequantizes-whole-table"
    """DequantizeLinear before Gather converts the whole table at every inference; gather integers instead."""
    WEIGHT_ONLY_MATMUL_REQUANTIZES = "weight-only-matmul-requantizes-activations"
    """A MatMul with dequantized weights becomes a kernel that rounds activations to 8 bits."""
    INT2_BLOCKS_NEED_FOUR_COLUMNS = "int2-blocks-wrong-unless-columns-divide-by-four"
    """Blocks of 2 bits give wrong results without an error for a matrix [K, N] with an N that 4 does not divide."""


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class Runtime(FrozenModel):
    """``opset_max``, ``ir_max``: newest opset and IR version it runs. ``threads``: number rates and tables hold for."""

    name: str
    opset_max: PositiveInt
    ir_max: PositiveInt
    threads: PositiveInt


class Weights(FrozenModel):
    """``stored_bits``: widths a weight may have in the file. ``integer_bits``: those of them that integer kernels can
    take once loaded. ``saturating_pairs``: kernels add two u8*s8 products in 16 bits, see ``Target``."""

    stored_bits: tuple[Bits, ...]
    integer_bits: tuple[Bits, ...]
    per_channel: bool
    symmetric: bool
    saturating_pairs: bool


class StorageRule(FrozenModel):
    """A way to write weights of ``bits`` into the file: plain (an integer constant), cast (a sub-byte constant and a
    Cast), packed-bytes (uint8 and bit operations folded at load). Earlier rules are preferred. ``block``: the rule is
    for scales of blocks of that many, which are plain constants of their own width behind a DequantizeLinear."""

    expression: Literal["plain", "cast", "packed-bytes"]
    bits: tuple[Bits, ...]
    block: PositiveInt | None = None
    min_opset: PositiveInt
    min_ir: PositiveInt


class OperatorRule(FrozenModel):
    """``layers``: with constant weights, activation mode (``weight-only``, ``a8``, …) → what the kernel computes in, or
    ``illegal``; ``weight-only-b32`` is a matrix [K, N] with scales for blocks of 32 along K. ``integer``: without,
    activation bits that run in an integer kernel; ``only_if``: attribute values this needs. ``per_channel``: None means
    as in ``weights``. ``explicit``: activation bits whose integers the operator moves when it is written between them
    itself, because the runtime does not take Q/DQ off it. ``float_output``: the integer kernel of a layer can write
    float, so nothing need be quantized behind it."""

    layers: dict[str, LayerMode] = {}
    integer: tuple[Bits, ...] = ()
    only_if: dict[str, str] = {}
    explicit: tuple[Bits, ...] = ()
    per_channel: bool | None = None
    float_output: bool = False


class FormatRates(FrozenModel):
    """Rates of kernels that compute in one format. ``kernel_us``: fixed time of one, beside dispatch.
    ``bandwidth_bytes_per_s``: at which operands pass. ``work_per_s``: kind → multiply-accumulates per second; for kinds
    without them (elementwise, pool, movement, other) elements read and written per second."""

    kernel_us: NotNegativeFloat
    bandwidth_bytes_per_s: PositiveFloat
    work_per_s: dict[Kind, PositiveFloat]


class Rates(FrozenModel):
    """Roofline: a node takes ``dispatch_us``, its format's ``kernel_us``, and the longer of work and memory traffic.
    ``*_ns_per_element``: activation bits → time of a conversion."""

    dispatch_us: NotNegativeFloat
    quantize_ns_per_element: dict[int, NotNegativeFloat]
    dequantize_ns_per_element: dict[int, NotNegativeFloat]
    executed: dict[Executed, FormatRates]

    def of(self, executed: str) -> FormatRates | None:
        """Rates of a format; None where the descriptor has none."""
        return next((rates for name, rates in self.executed.items() if name == executed), None)

    def has_rate(self, executed: str, kind: Kind) -> bool:
        rates = self.of(executed)
        return rates is not None and kind in rates.work_per_s


class Memory(FrozenModel):
    """Sizes of the device's memories; None: not a limit."""

    flash_bytes: PositiveInt | None = None
    sram_bytes: PositiveInt | None = None
