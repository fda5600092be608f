"""Emitted patterns executed by ONNX Runtime: packed integers come back exactly, and as constants for its kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser
from small_plan import emit, images, make_plan

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.emit import (
    PACK_PASS,
    PASS_KEY,
    dequantize_weight,
    emitted_bytes,
    isolated_dequantize,
    scale_weight,
)
from lcpaq_onnx.graph.graph_io import node_metadata
from lcpaq_onnx.graph.packing import pack_planes, unpack_blob, unpack_cast
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.runtime.session import Session, SessionOptions

WIDTHS = range(2, 8)
LEVELS = ("none", "all")
SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)


def run_alone(nodes: list[gs.Node], results: list[gs.Variable], level: str, opset: int) -> list[np.ndarray]:
    """What ``nodes``, which need no input, give in ONNX Runtime."""
    shell = parser.parse_model(
        f'<ir_version: {13 if opset > 23 else 10}, opset_import: ["": {opset}]> g () => () {{ }}'
    )
    graph = graph_io.load(shell)
    graph.nodes = nodes
    graph.outputs = results
    onnx.checker.check_model(graph_io.to_proto(graph))
    session = Session(graph_io.to_proto(graph), SessionOptions(level, threads=1))  # type: ignore[arg-type]
    return list(session.run({}).values())


def typed(name: str, dtype: type, rank: int) -> gs.Variable:
    return gs.Variable(name, np.dtype(dtype), [None] * rank)


def packed(values: list[np.ndarray], bits: int) -> tuple[list[gs.Node], list[gs.Variable]]:
    padded = np.concatenate([np.pad(v.reshape(-1), (0, -v.size % 8)) for v in values])
    results = [typed(f"w{index}/q", np.int8, v.ndim) for index, v in enumerate(values)]
    pieces = [(result, v.shape) for result, v in zip(results, values, strict=True)]
    return unpack_blob(pack_planes(padded, bits), bits, pieces, PACK_PASS), results


def draw(rng: np.random.Generator, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), size=shape).astype(np.int8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("level", LEVELS)
@settings(deadline=None, max_examples=12, derandomize=True)
@given(shapes=SHAPES, seed=st.integers(0, 1000))
def test_packed_pieces_come_back_exactly(bits: int, level: str, shapes: list[tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [draw(rng, bits, shape) for shape in shapes]
    found = run_alone(*packed(values, bits), level, opset=14)
    for expected, actual in zip(values, found, strict=True):
        assert actual.dtype == np.int8
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_value_of_a_width_at_every_place_of_a_byte(bits: int) -> None:
    every = np.arange(-(1 << (bits - 1)), 1 << (bits - 1)).astype(np.int8)
    values = [np.roll(np.tile(every, 8), shift)[: 8 * len(every) - shift] for shift in range(8)]
    for expected, actual in zip(values, run_alone(*packed(values, bits), "none", opset=14), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_take_exactly_the_stored_bits(bits: int) -> None:
    planes = pack_planes(np.zeros(800, np.int8), bits)
    assert sum(plane.nbytes for plane in planes) == 100 * bits


@pytest.mark.parametrize(("bits", "opset"), [(4, 21), (2, 25)])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 3, 3)], ids=str)
def test_narrow_types_come_back_exactly(bits: int, opset: int, level: str, shape: tuple[int, ...]) -> None:
    values = draw(np.random.default_rng(bits), bits, shape)
    result = typed("w/q", np.int8, len(shape))
    (found,) = run_alone([unpack_cast(values, bits, result, PACK_PASS)], [result], level, opset)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_both_forms_of_a_weight_give_the_rounded_floats_bit_for_bit(axis: int | None, bits: int) -> None:
    values = np.random.default_rng(axis or 7).normal(size=(4, 3, 2, 5)).astype(np.float32)
    weight = round_nearest(values, QFormat(bits=bits, axis=axis))
    result = typed("w", np.float32, 4)
    for nodes in ([dequantize_weight(weight, result, "test")], scale_weight(weight, typed("v", np.float32, 4), "test")):
        (found,) = run_alone(nodes, list(nodes[-1].outputs), "none", opset=21)
        np.testing.assert_array_equal(found, weight.dequantized())


def test_an_isolated_dequantizer_gives_the_same_numbers() -> None:
    integers = gs.Constant("x/q", np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    result = typed("x/layer", np.float32, 3)
    format = QFormat(bits=8, signed=False, symmetric=False)
    node = isolated_dequantize(integers, result, 0.3, 5, 3, format, "test")
    (found,) = run_alone([node], [result], "none", opset=13)
    np.testing.assert_array_equal(found, (integers.values.astype(np.float32) - 5) * np.float32(0.3))


def test_nodes_say_which_pass_made_them() -> None:
    nodes, _ = packed([np.zeros(5, np.int8), np.zeros(9, np.int8)], 6)
    assert {node_metadata(node)[PASS_KEY] for node in nodes} == {PACK_PASS}
    assert len({node.name for node in nodes}) == len(nodes)


def test_counted_bytes_are_those_of_a_file() -> None:
    def size(nodes: list[gs.Node]) -> int:
        graph = graph_io.load(parser.parse_model('<ir_version: 10, opset_import: ["": 21]> g () => () { }'))
        graph.nodes = nodes
        return graph_io.serialized_size(graph)

    nodes, results = packed([np.zeros((3, 5), np.int8), np.zeros(90, np.int8)], 5)
    for result in results:  # tensors that passes add carry no type
        result.dtype = result.shape = None
    # The graph's own length takes one byte more from 128 bytes on.
    assert size(nodes) - size([]) == emitted_bytes(nodes) + 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_weights_end_as_constants_of_integer_kernels(tmp_path: Path, bits: int) -> None:
    names = ("stem", "middle", "head/project", "classify")
    emitted = emit(tmp_path, make_plan(dict.fromkeys(names, f"w{bits}a8"), opset=25 if bits == 2 else 21))
    optimized = tmp_path / "optimized.onnx"
    Session(emitted.path, SessionOptions("all", threads=1, optimized_model_path=optimized))
    model = onnx.load(optimized)
    ops = [node.op_type for node in model.graph.node]
    # Weights of layers: 4 convolutions and a Gemm in integer, nothing of the unpacking left.
    assert sum(op in ("QLinearConv", "QGemm") for op in ops) == 5
    assert not {"BitShift", "Mod", "Split", "Slice", "Cast", "Reshape"} & set(ops)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [v for v in constants.values() if v.ndim >= 2]
    assert all(v.dtype in (np.int8, np.uint8) for v in weights)
    assert len(weights) == 5


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weight_only_storage_folds_to_float_constants(tmp_path: Path, bits: int) -> None:
    emitted = emit(tmp_path, make_plan({"middle": f"w{bits}", "classify": f"w{bits}"}))
    optimized = tmp_path / "optimized.onnx"
    session = Session(emitted.path, SessionOptions("all", threads=1, optimized_model_path=optimized))
    ops = [node.op_type for node in onnx.load(optimized).graph.node]
    assert not {"BitShift", "Mod", "Cast", "Mul"} & set(ops)
    assert np.isfinite(session.run(images(1)[0])["scores"]).all()
