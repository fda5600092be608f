"""Rounding against ONNX Runtime's own QuantizeLinear and DequantizeLinear, and against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.numeric.rounding import activation_parameters, fake_quantize, mse_scales, round_nearest
from lcpaq_onnx.runtime.session import Session, SessionOptions

FAST = settings(deadline=None, max_examples=25, derandomize=True)
# Zeros, subnormals, huge: all finite float32 but those that the scale's last digit could round to infinity.
FLOATS = st.floats(np.float32(-3e38).item(), np.float32(3e38).item(), width=32)
USUAL = st.floats(-8, 8, width=32)
SYMMETRIC = [QFormat(bits=bits) for bits in (2, 3, 4, 5, 6, 7, 8, 16)]
ACTIVATIONS = [
    QFormat(bits=bits, signed=signed, symmetric=symmetric)
    for bits, signed, symmetric in [(8, False, False), (8, True, False), (16, False, False), (16, True, False)]
] + [QFormat(bits=8, symmetric=True), QFormat(bits=16, symmetric=True)]  # fmt: skip
_TYPES = {
    "int2": TensorProto.INT2,
    "int4": TensorProto.INT4,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
}
_SESSIONS: dict[tuple[str, int | None, int], Session] = {}


def qdq_session(dtype: str, axis: int | None, rank: int) -> Session:
    """QuantizeLinear, then DequantizeLinear, with the integers cast to int32 as a second output."""
    key = (dtype, axis, rank)
    if key not in _SESSIONS:
        attributes = {} if axis is None else {"axis": axis}
        nodes = [
            make_node("Cast", ["z32"], ["z"], to=_TYPES[dtype]),  # numpy's narrow types cannot be fed
            make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
            make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
            make_node("Cast", ["q"], ["i"], to=TensorProto.INT32),
        ]
        parameter = [] if axis is None else [None]
        graph = make_graph(
            nodes,
            "qdq",
            [
                make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank),
                make_tensor_value_info("s", TensorProto.FLOAT, parameter),
                make_tensor_value_info("z32", TensorProto.INT32, parameter),
            ],
            [
                make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank),
                make_tensor_value_info("i", TensorProto.INT32, [None] * rank),
            ],
        )
        model = make_model(graph, opset_imports=[make_opsetid("", 25)], ir_version=13)
        _SESSIONS[key] = Session(model, SessionOptions("none", threads=1))
    return _SESSIONS[key]


def in_runtime(
    values: np.ndarray, scale: np.ndarray, zero_point: int, format: QFormat
) -> tuple[np.ndarray, np.ndarray]:
    """(integers, values back) of ONNX Runtime, in the narrowest type that it has for the format."""
    bits = next(b for b in (2, 4, 8, 16) if b >= format.bits)
    dtype = f"{'' if format.signed else 'u'}int{bits}"
    zeros = np.full(scale.shape, zero_point, np.int32)
    result = qdq_session(dtype, format.axis, values.ndim).run({"x": values, "s": scale, "z32": zeros})
    return result["i"], result["y"]


# ---- weights --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", SYMMETRIC, ids=str)
@FAST
@given(values=hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=FLOATS),
       axis=st.none() | st.integers(0, 3))  # fmt: skip
def test_integers_are_those_of_onnx_runtime(format: QFormat, values: np.ndarray, axis: int | None) -> None:
    assume(axis is None or axis < values.ndim)
    format = QFormat(bits=format.bits, axis=axis)
    rounded = round_nearest(values, format)
    integers, back = in_runtime(values, rounded.scale, 0, format)
    # The runtime saturates at the type's ends, the format may end earlier.
    expected = np.clip(integers, format.qmin, format.qmax)
    np.testing.assert_array_equal(rounded.integers, expected)
    if np.array_equal(expected, integers):
        np.testing.assert_array_equal(rounded.dequantized(), back)


@pytest.mark.parametrize("format", SYMMETRIC, ids=str)
@FAST
@given(values=hnp.arrays(np.float32, (3, 7), elements=FLOATS), axis=st.sampled_from([None, 0, 1, -1]))
def test_scales_are_one_normal_number_per_channel(format: QFormat, values: np.ndarray, axis: int | None) -> None:
    scale = mse_scales(values, QFormat(bits=format.bits, axis=axis))
    assert scale.shape == (() if axis is None else (values.shape[axis],))
    assert scale.dtype == np.float32
    assert np.isfinite(scale).all()
    # A subnormal scale has no finite reciprocal, which kernels multiply with.
    assert (scale >= np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("format", SYMMETRIC, ids=str)
@FAST
@given(values=hnp.arrays(np.float32, (4, 9), elements=USUAL))
def test_scales_are_never_worse_than_the_largest_magnitude(format: QFormat, values: np.ndarray) -> None:
    format = QFormat(bits=format.bits, axis=0)
    largest = np.abs(values).max(axis=1)
    absmax = np.where(largest > 0, np.maximum(largest / format.qmax, np.finfo(np.float32).tiny), 1.0)

    def errors(scale: np.ndarray) -> np.ndarray:
        difference = round_nearest(values, format, scale.astype(np.float32)).dequantized().astype(np.float64) - values
        return (difference**2).sum(axis=1)

    # The candidates are compared in float32: two that are equal to its last digits may be swapped.
    assert (errors(mse_scales(values, format)) <= errors(absmax) * (1 + 1e-5) + 1e-12 * largest**2).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_gain_on_gaussian_weights(bits: int) -> None:
    values = np.random.default_rng(0).normal(size=(8, 400)).astype(np.float32)
    format = QFormat(bits=bits, axis=0)
    absmax = (np.abs(values).max(axis=1) / format.qmax).astype(np.float32)

    def error(scale: np.ndarray) -> float:
        return float(((round_nearest(values, format, scale).dequantized() - values) ** 2).mean())

    # The best uniform quantizer of a Gaussian has error 0.119, 0.0374, 0.0115 at 2, 3, 4 bits (Max 1960, table II),
    # with symmetric midrise levels; 2**bits - 1 usable levels on one side and the grid cost some of it.
    assert error(mse_scales(values, format)) < {2: 0.19, 3: 0.05, 4: 0.0145}[bits]
    assert error(mse_scales(values, format)) < 0.8 * error(absmax)


def test_a_zero_channel_is_exact_and_has_scale_one() -> None:
    values = np.array([[0, 0], [1, -3]], np.float32)
    rounded = round_nearest(values, QFormat(bits=4, axis=0))
    assert rounded.scale[0] == 1
    assert not rounded.dequantized()[0].any()


def test_scale_of_one_channel_does_not_depend_on_the_others() -> None:
    values = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
    together = mse_scales(values, QFormat(bits=3, axis=0))
    alone = [mse_scales(row[None], QFormat(bits=3, axis=0))[0] for row in values]
    np.testing.assert_array_equal(together, alone)


def test_ties_go_to_even_and_overflow_saturates() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 99, -99], np.float32)
    integers = round_nearest(values, QFormat(bits=4), np.ones((), np.float32)).integers
    assert integers.tolist() == [0, 2, 2, 0, -2, 7, -8]
    assert round_nearest(values * 100, QFormat(bits=8), np.ones((), np.float32)).integers.min() == -127


def test_inputs_stay_as_they_are() -> None:
    values = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    before = values.copy()
    round_nearest(values, QFormat(bits=4, axis=1))
    fake_quantize(values, np.float32(0.1), 3, ACTIVATIONS[0])
    np.testing.assert_array_equal(values, before)


# ---- activations ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ACTIVATIONS, ids=str)
@FAST
@given(values=hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=6), elements=FLOATS),
       low=FLOATS, high=FLOATS)  # fmt: skip
def test_fake_quantization_is_that_of_onnx_runtime(
    format: QFormat, values: np.ndarray, low: float, high: float
) -> None:
    scale, zero_point = activation_parameters(min(low, high), max(low, high), format)
    integers, back = in_runtime(values, np.array(scale), zero_point, format)
    # Symmetric formats leave out the type's least value, which no range chosen for them reaches.
    reached = integers >= format.qmin
    ours = fake_quantize(values, scale, zero_point, format)
    assert ours.dtype == np.float32
    assert ours.shape == values.shape
    np.testing.assert_array_equal(ours[reached], back[reached])


@pytest.mark.parametrize("format", ACTIVATIONS, ids=str)
@FAST
@given(low=FLOATS, high=FLOATS)
def test_activation_parameters_cover_the_range_and_zero_exactly(format: QFormat, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    scale, zero_point = activation_parameters(low, high, format)
    assert format.qmin <= zero_point <= format.qmax
    assert scale > 0
    assert np.isfinite(scale)
    assert fake_quantize(np.zeros((), np.float32), scale, zero_point, format) == 0
    # The zero point is rounded to an integer, so the ends may be off by half a step; the scale by its last digit.
    first, last = ((q - zero_point) * float(scale) for q in (format.qmin, format.qmax))
    slack = 0.5 * float(scale) + 1e-6 * (high - low)
    assert first <= low + slack
    assert last >= high - slack


@pytest.mark.parametrize("format", ACTIVATIONS, ids=str)
def test_an_empty_range_gives_a_usable_scale(format: QFormat) -> None:
    scale, zero_point = activation_parameters(0.0, 0.0, format)
    assert scale == 1
    assert fake_quantize(np.zeros(3, np.float32), scale, zero_point, format).tolist() == [0, 0, 0]


# ---- formats --------------------------------------------------------------------------------------------------------
@given(
    bits=st.integers(2, 16),
    signed=st.booleans(),
    symmetric=st.booleans(),
    axis=st.none() | st.integers(-3, 3),
    block=st.none() | st.sampled_from([16, 32]),
)
def test_format_text_is_read_back(
    bits: int, signed: bool, symmetric: bool, axis: int | None, block: int | None
) -> None:
    assume(axis is not None or block is None)
    format = QFormat(bits=bits, signed=signed, symmetric=symmetric, axis=axis, block=block)
    assert QFormat.parse(str(format)) == format


@pytest.mark.parametrize("text", ["int1:sym", "int17:sym", "int8", "float8:sym", "int8:sym:block=3", ""])
def test_nonsense_is_no_format(text: str) -> None:
    with pytest.raises(UsageError):
        QFormat.parse(text)
