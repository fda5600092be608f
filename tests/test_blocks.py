"""Block-wise weights: what the file says, what ONNX Runtime makes of it, and when the planner takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser
from planning_case import widest_assignment
from quantizing import UINT8, Prepared, emit, plan_of, prepare
from test_size_model import predicted_bytes

from lcpaq_onnx import compiler
from lcpaq_onnx.allocation.problem import AllocationProblem
from lcpaq_onnx.formats import LayerFormat, QFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.stored import stored_weight
from lcpaq_onnx.graph.written import read_model
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.numeric.rounding import mse_scales, round_nearest
from lcpaq_onnx.passes import CostTables, GraphStructure, MemoryTimeline, RecordedTensors
from lcpaq_onnx.passes.analysis.block_layers import takes_blocks
from lcpaq_onnx.planning.bench import Settings
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.formulate import Formulation, activation_decision
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.runtime.session import Session, SessionOptions
from lcpaq_onnx.targets.loader import load as load_target

UNFUSED = SessionOptions("none", threads=1)
FUSED = SessionOptions("all", threads=1)
EXACT = SessionOptions("all", threads=1, config=(("session.qdq_matmulnbits_accuracy_level", "0"),))
FAST = settings(deadline=None, max_examples=12, derandomize=True)
HEADER = '<ir_version: 10, opset_import: ["": 21]>'
# As exporters write them: [rows, K] x [K, N] with the bias in an Add or in the Gemm, and one MatMul without any.
LAYERS = {
    "matmul": "{ [layer] y = MatMul(x, w) }",
    "matmul-add": "{ [layer] t = MatMul(x, w) [sum] y = Add(t, b) }",
    "gemm": "{ [layer] y = Gemm(x, w, b) }",
    "gemm-without-bias": "{ [layer] y = Gemm(x, w) }",
}


def one_layer(body: str, depth: int, columns: int, *, rows: int = 3, opset: int = 25) -> Prepared:
    model = parser.parse_model(f"{HEADER} g (float[n, {depth}] x) => (float[n, {columns}] y) {LAYERS[body]}")
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    model.ir_version = 13 if opset > 24 else 10
    rng = np.random.default_rng(depth)
    for name, shape in (("w", (depth, columns)), ("b", (columns,))):
        if name in LAYERS[body].replace("body", ""):
            values = rng.normal(size=shape).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(values, name))
    return prepare(model, {"x": rng.normal(size=(rows, depth)).astype(np.float32)})


def run_with(prepared: Prepared, model: onnx.ModelProto, options: SessionOptions) -> np.ndarray:
    return Session(model, options).run(prepared.feed)["y"]


def kernels_of(model: onnx.ModelProto, folder: Path) -> list[str]:
    path = folder / "optimized.onnx"
    Session(model, SessionOptions("all", threads=1, optimized_model_path=path))
    return [node.op_type for node in onnx.load(path).graph.node]


# ---- scales ---------------------------------------------------------------------------------------------------------
@FAST
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    axis=st.integers(-3, 2),
    block=st.integers(1, 48),
    bits=st.integers(2, 8),
)
def test_each_block_is_rounded_by_itself(shape: tuple[int, ...], axis: int, block: int, bits: int) -> None:
    axis = axis % len(shape) if axis >= 0 else -1 - axis % len(shape)
    values = np.random.default_rng(bits).normal(size=shape).astype(np.float32)
    format = QFormat(bits=bits, axis=axis, block=block)
    rounded = round_nearest(values, format)
    assert rounded.scale.shape == format.scale_shape(shape)
    assert rounded.scale.flags.c_contiguous
    for index in range(format.scale_shape(shape)[axis]):
        part = values.take(range(index * block, min((index + 1) * block, shape[axis])), axis=axis)
        lines = np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1)
        # One scale for each line of the block: the ordinary scales per channel, with the lines as channels.
        alone = round_nearest(lines, QFormat(bits=bits, axis=1))
        np.testing.assert_array_equal(rounded.scale.take(index, axis=axis).reshape(-1), alone.scale)
        found = rounded.dequantized().take(range(index * block, index * block + part.shape[axis]), axis=axis)
        np.testing.assert_array_equal(np.moveaxis(found, axis, 0).reshape(lines.shape), alone.dequantized())


def test_smaller_blocks_have_smaller_errors() -> None:
    values = np.random.default_rng(0).standard_t(4, size=(256, 16)).astype(np.float32)
    formats = [QFormat(bits=4, axis=1), *(QFormat(bits=4, axis=0, block=block) for block in (256, 64, 16))]
    errors = [np.square(round_nearest(values, f).dequantized() - values).mean() for f in formats]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)  # a block of everything is a channel
    assert errors[1] > errors[2] > errors[3]
    assert mse_scales(np.zeros((5, 2), np.float32), QFormat(bits=4, axis=0, block=2)).tolist() == [[1.0, 1.0]] * 3


def test_layer_formats_have_a_text() -> None:
    format = LayerFormat.parse("w4b32")
    assert (format.weight_bits, format.activation_bits, format.block) == (4, None, 32)
    assert (str(format), format.stored) == ("w4b32", "w4b32")
    assert format.is_weight_only
    assert not format.is_folded
    assert LayerFormat.parse("w4").is_folded
    assert (LayerFormat.parse("w4a8").stored, LayerFormat.parse("f32").stored) == ("w4", "f32")


# ---- the file, and the runtime --------------------------------------------------------------------------------------
@FAST
@given(
    body=st.sampled_from(sorted(LAYERS)),
    bits=st.sampled_from([2, 4, 8]),
    depth=st.integers(1, 100),
    columns=st.integers(1, 12),
)
def test_blocks_compute_the_rounded_product(
    tmp_path_factory: pytest.TempPathFactory, body: str, bits: int, depth: int, columns: int
) -> None:
    columns *= 4 if bits == 2 else 1
    prepared = one_layer(body, depth, columns)
    plan = plan_of(prepared, {"layer": f"w{bits}b32"}, {}, opset=25)
    graph = emit(prepared, plan)
    path = tmp_path_factory.mktemp("blocks") / "emitted.onnx"
    graph_io.save(graph, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert path.stat().st_size == predicted_bytes(prepared, plan)
    constants = {t.name: numpy_helper.to_array(t) for t in graph_io.to_proto(prepared.graph).graph.initializer}
    weight = round_nearest(constants["w"], QFormat(bits=bits, axis=0, block=32)).dequantized()
    expected = prepared.feed["x"] @ weight + constants.get("b", 0)
    # Sums of up to 100 products in another order than numpy's.
    tolerance = 1e-6 * float((np.abs(prepared.feed["x"]) @ np.abs(weight)).max()) + 1e-7
    np.testing.assert_allclose(run_with(prepared, model, UNFUSED), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(run_with(prepared, model, EXACT), expected, rtol=0, atol=tolerance)
    # By default the input is rounded to 8 bits, half a step of each block's largest value.
    step = np.abs(prepared.feed["x"]).max() / 254
    largest = float(np.abs(weight).sum(axis=0).max()) * step * 1.1 + tolerance
    np.testing.assert_allclose(run_with(prepared, model, FUSED), expected, rtol=0, atol=largest)
    assert kernels_of(model, path.parent) == ["MatMulNBits"]
    stored = stored_weight(read_model(path), "w")
    assert stored is not None
    assert (stored.storage, stored.bits, stored.block) == ("plain", bits, 32)
    assert stored.has_scales_of(QFormat(bits=bits, axis=0, block=32))
    assert not stored.has_scales_of(QFormat(bits=bits, axis=0, block=16))
    assert not stored.has_scales_of(QFormat(bits=bits, axis=1))


@pytest.mark.parametrize("columns", [6, 7])
def test_the_quirk_of_2_bits_is_still_there(columns: int) -> None:
    """Should this fail, ONNX Runtime got it right: lift the quirk."""
    prepared = one_layer("matmul", 64, columns)
    model = graph_io.to_proto(emit(prepared, plan_of(prepared, {"layer": "w2b32"}, {}, opset=25)))
    right, wrong = run_with(prepared, model, UNFUSED), run_with(prepared, model, EXACT)
    assert np.abs(wrong - right).max() > 0.1 * np.abs(right).max()


@pytest.mark.parametrize("quantized", ["x", "y"])
def test_beside_a_quantizer_the_runtime_has_no_kernel(tmp_path: Path, quantized: str) -> None:
    prepared = one_layer("matmul", 64, 8)
    plan = plan_of(prepared, {"layer": "w4b32"}, {quantized: UINT8}, opset=25, isolate=False)
    assert "MatMulNBits" not in kernels_of(graph_io.to_proto(emit(prepared, plan)), tmp_path)


AROUND = {
    "residual": (2, "{ [layer] t = MatMul(x, w) [sum] y = Add(t, x) }"),
    "residual of three axes": (3, "{ [layer] t = MatMul(x, w) [sum] y = Add(x, t) }"),
    "bias": (2, "{ [layer] t = MatMul(x, w) [sum] y = Add(b, t) }"),
    "bias, then residual": (2, "{ [layer] t = MatMul(x, w) [sum] u = Add(t, b) [more] y = Add(u, x) }"),
    "bias of two axes": (2, "{ [layer] t = MatMul(x, w) [sum] y = Add(t, row) }"),
    "scalar": (2, "{ [layer] t = MatMul(x, w) [sum] y = Add(t, one) }"),
    "relu": (2, "{ [layer] t = MatMul(x, w) [act] y = Relu(t) }"),
    "gemm": (2, "{ [layer] y = Gemm(x, w, b) }"),
    "gemm, bias of two axes": (2, "{ [layer] y = Gemm(x, w, row) }"),
    "gemm, scalar": (2, "{ [layer] y = Gemm(x, w, one) }"),
    "gemm, residual inside": (2, "{ [layer] y = Gemm(x, w, x) }"),
    "gemm, residual behind": (2, "{ [layer] t = Gemm(x, w) [sum] y = Add(t, x) }"),
    "gemm, transposed": (2, "{ [layer] y = Gemm <transB = 1> (x, w, b) }"),
    "gemm, scaled": (2, "{ [layer] y = Gemm <alpha = 2.0> (x, w, b) }"),
}


@pytest.mark.parametrize("case", AROUND)
def test_blocks_are_legal_exactly_where_the_runtime_has_a_kernel(tmp_path: Path, case: str) -> None:
    rank, body = AROUND[case]
    free = ", ".join(["n", "m"][: rank - 1])
    model = parser.parse_model(f"{HEADER} g (float[{free}, 32] x) => (float[{free}, 32] y) {body}")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (32, 32)), ("b", (32,)), ("row", (1, 32)), ("one", ())):
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    prepared = prepare(model, {"x": rng.normal(size=(3, 2, 32)[-rank:]).astype(np.float32)})
    (layer,) = prepared.structure.layers
    node = next(node for node in prepared.graph.nodes if node.name == "layer")
    target, format = load_target("onnxruntime-cpu-x86_64-vnni"), LayerFormat.parse("w4b32")
    kernels = kernels_of(graph_io.to_proto(emit(prepared, plan_of(prepared, {"layer": "w4b32"}, {}))), tmp_path)
    assert takes_blocks(node, layer, format, rank, target) == ("MatMulNBits" in kernels)


# ---- planning -------------------------------------------------------------------------------------------------------
DEPTH, HIDDEN = 192, 768


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row through two large matrices: what a decoder does for each token."""
    model = parser.parse_model(
        f"{HEADER} g (float[n, {DEPTH}] x) => (float[n, {DEPTH}] y)"
        " { [up] h = MatMul(x, w1) [middle] r = Tanh(h) [down] t = MatMul(r, w2) [sum] y = Add(t, b) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (DEPTH, HIDDEN)), ("w2", (HIDDEN, DEPTH)), ("b", (DEPTH,))):
        values = (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    path = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    onnx.save(model, path)
    return path


def rows() -> list[dict[str, np.ndarray]]:
    return [{"x": row} for row in np.random.default_rng(1).normal(size=(8, 1, DEPTH)).astype(np.float32)]


@pytest.fixture(scope="module")
def quantized(decoder: Path) -> compiler.Quantized:
    """With float activations: int8 ones are faster still where they are allowed."""
    return compiler.quantize(decoder, rows(), weights=[4, 8], activations=[32], objective="latency")


def test_decoding_takes_blocks_where_activations_stay_float(quantized: compiler.Quantized) -> None:
    plan, report = quantized.plan, quantized.report
    for layer in plan.layers:
        assert layer.layer_format.block == 32
        assert layer.executed == f"nbits{layer.layer_format.weight_bits}"
        assert layer.storage == "plain"
        assert str(layer.qformat).endswith(":sym:axis=0:block=32")
    assert report.passed, report.failed_checks
    assert {row.kernel for row in report.layers} == {"MatMulNBits"}
    assert all(row.is_integer for row in report.layers)
    assert plan.predicted.latency_us < 0.7 * plan.predicted.float_latency_us
    assert plan.predicted.bops == plan.predicted.float_bops / 16 == report.measured.bops
    assert report.emitted.size_bytes == plan.predicted.size_bytes


def test_a_plan_with_blocks_replays_to_the_same_bytes(decoder: Path, quantized: compiler.Quantized) -> None:
    again = compiler.apply(decoder, Plan.from_json(quantized.plan.to_json()), rows())
    assert graph_io.to_proto(again).SerializeToString() == quantized.model.SerializeToString()


@pytest.fixture(scope="module")
def problem(decoder: Path) -> AllocationProblem:
    measured = compiler.analyze(decoder, rows(), settings=Settings(estimator="hessian-diagonal"))
    target = load_target("onnxruntime-cpu-x86_64-vnni")
    analyses = AnalysisManager(compiler.prepare(graph_io.load(decoder)), AnalysisInputs(target=target))
    analyses.put(RecordedTensors(), measured.tensors)
    return Formulation(
        structure=analyses.get(GraphStructure),
        tensors=measured.tensors,
        errors=measured.errors,
        costs=analyses.get(CostTables),
        timeline=analyses.get(MemoryTimeline),
        target=target,
        allowed=Allowed(),
        quantizable=frozenset(measured.ranges),
        float_size_bytes=measured.source_size_bytes,
        explicit=frozenset(),
    ).problem()


@pytest.mark.parametrize("tensor", ["x", "h", "y"])
def test_blocks_keep_both_ends_in_float(problem: AllocationProblem, tensor: str) -> None:
    assignment = widest_assignment(problem) | {"up": "w4b32", "down": "w4b32"}
    assert problem.violations(assignment) == ()
    # ``y`` is what the Add writes that becomes one Gemm with the layer before it.
    (violation,) = problem.violations(assignment | {activation_decision(tensor): "a8"})
    assert "w4b32" in violation
