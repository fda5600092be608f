"""Facts about ONNX operators, in one table: passes and analyses ask here and hold no list of operator names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FACTS", "OpFacts", "facts_of", "has_integer_form", "sums_over_rows", "weight_channel_axis"]


@dataclass(frozen=True, kw_only=True)
class OpFacts:
    """What quantization needs to know of one operator.

    ``weight_input``: index of the input that holds constant weights when the node is a layer, else None.
    ``looks_up``: a layer that multiplies nothing where input 0 is a constant table and input 1 picks rows of it.
    ``input_channel_axis``: axis of the data input that the weights sum over, of fixed extent.
    ``bias_input``: index of the optional bias added in the accumulator's precision.
    ``keeps_scale``: every output element is an input element (or zero), so input and output share one scale.
    ``fill_input``: index of the input whose value joins the copied ones; the scale is kept only where that is zero.
    ``activation``: elementwise function that integer kernels absorb in their output's saturation.
    ``integer_kernel``: some runtime computes it on integers although it has no weights; which ones is the target's
    business, this only tells whose operands are worth observing.
    """

    weight_input: int | None = None
    looks_up: bool = False
    bias_input: int | None = None
    input_channel_axis: int = 1
    keeps_scale: bool = False
    fill_input: int | None = None
    activation: bool = False
    integer_kernel: bool = False


_LAYER_BIAS = OpFacts(weight_input=1, bias_input=2)
_KEEPS = OpFacts(keeps_scale=True)

FACTS: Mapping[str, OpFacts] = {
    "Conv": _LAYER_BIAS,
    "ConvTranspose": _LAYER_BIAS,
    "Gemm": _LAYER_BIAS,
    "MatMul": OpFacts(weight_input=1, input_channel_axis=-1, integer_kernel=True),
    # With constant rows a layer, with rows of an activation a mover.
    "Gather": OpFacts(looks_up=True, keeps_scale=True),
    "Pad": OpFacts(keeps_scale=True, fill_input=2),
    "Relu": OpFacts(activation=True),
    "Clip": OpFacts(activation=True),
    **dict.fromkeys(
        [
            *("Add", "AveragePool", "Concat", "Div", "GlobalAveragePool", "HardSigmoid", "HardSwish", "LeakyRelu"),
            *("Mul", "Resize", "Sigmoid", "Softmax", "Sub", "Tanh", "Where"),
        ],
        OpFacts(integer_kernel=True),
    ),
    **dict.fromkeys(
        [
            *("DepthToSpace", "Expand", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth"),
            *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
        ],
        _KEEPS,
    ),
}

_NONE = OpFacts()


def facts_of(op: str, domain: str | None = "") -> OpFacts:
    """Facts of ``op``; operators of other domains and unknown ones have none and stay in float."""
    return FACTS.get(op, _NONE) if domain in ("", None, "ai.onnx") else _NONE


def weight_channel_axis(op: str, attrs: Mapping[str, object], weight_shape: tuple[int, ...]) -> int | None:
    """Axis of the weight that runs over output channels, None where per-channel scales have no such axis.

    Conv-11: [M, C/g, k…] → 0. ConvTranspose-11: [C, M/g, k…] → 1, None for g > 1 (one index, g channels).
    Gemm-13: [K, N] → 1, transposed [N, K] → 0. MatMul-13: last axis of a matrix. Gather-13: rows of the table.
    """
    if facts_of(op).looks_up:
        return 0
    if op == "Conv":
        return 0
    if op == "ConvTranspose":
        return 1 if attrs.get("group", 1) == 1 else None
    if op == "Gemm":
        return 0 if attrs.get("transB", 0) else 1
    if op == "MatMul":
        return len(weight_shape) - 1 if len(weight_shape) == 2 else None
    return None


def has_integer_form(op: str, attrs: Mapping[str, object]) -> bool:
    """Whether integer kernels know what a layer computes: of Gemm-13 they know no factors."""
    return op != "Gemm" or (attrs.get("alpha", 1.0) == 1.0 and attrs.get("beta", 1.0) == 1.0)


def sums_over_rows(op: str, attrs: Mapping[str, object], weight_shape: tuple[int, ...]) -> bool:
    """Whether a layer is no more than the product with a matrix [K, N] (and a bias), summed over K."""
    if op == "Gemm":
        plain = not attrs.get("transA", 0) and not attrs.get("transB", 0)
        return plain and attrs.get("alpha", 1.0) == 1.0 and attrs.get("beta", 1.0) == 1.0
    return op == "MatMul" and len(weight_shape) == 2
