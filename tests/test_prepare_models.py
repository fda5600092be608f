"""The whole preparation, and raising the opset, on real models, random graphs and onnx's own operator cases."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from assets import assets_root
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from rewriting import assert_same_outputs, constants, outputs_of, parse, rewrite, traced
from test_graph_io_sweep import operator_cases

from lcpaq_onnx.errors import LcpaqError
from lcpaq_onnx.graph.constant_folding import SizeLimit, evaluate
from lcpaq_onnx.graph.graph_io import Graph, load, to_proto
from lcpaq_onnx.graph.usage import scopes
from lcpaq_onnx.passes.pipelines import PREPARE, raise_to
from lcpaq_onnx.passes.rewrite.canonical_names import CanonicalNames
from lcpaq_onnx.passes.rewrite.fold_constants import FoldConstants
from lcpaq_onnx.runtime.session import Session, SessionOptions

OWN = sorted((Path(__file__).resolve().parents[1] / "models").glob("*.onnx"))
ASSETS = sorted(assets_root().rglob("*.onnx")) if assets_root() else []
MODELS = [*OWN, *ASSETS]
# Large files, and other opsets than the one that int4 asks for, only in the slow run.
RAISES = [
    pytest.param(path, to, id=f"{path.stem}-{to}", marks=[pytest.mark.slow] if to != 21 or large else [])
    for path in MODELS
    for to in (13, 21, 25)
    for large in [path.stat().st_size > 5_000_000]
]
# Weights rounded once more (6e-8) in up to 60 layers, which add up like a random walk or, in the worst case, linearly.
FOLDED = 1e-5
# What is not folded runs the same kernels; those of another opset may sum in another order.
RAISED = 1e-5
HALF = 2e-3


def feed_of(model: onnx.ModelProto) -> dict[str, np.ndarray] | None:
    """A plausible random sample; None for a model that plain ONNX Runtime does not run."""
    try:
        inputs = Session(model, SessionOptions("none")).inputs
    except LcpaqError:
        return None
    rng = np.random.default_rng(3)
    feed = {}
    for spec in inputs:
        # The batch is 1; 64 elsewhere lets every pooling and stride of these models find something.
        unknown = [1 if axis == 0 or name == "batch" else 64 for axis, name in enumerate(spec.shape)]
        shape = [
            extent if isinstance(extent, int) else other for extent, other in zip(spec.shape, unknown, strict=True)
        ]
        whole = spec.dtype.kind in "iub"
        feed[spec.name] = (rng.integers(0, 20, shape) if whole else rng.standard_normal(shape)).astype(spec.dtype)
    return feed


def tolerance_of(model: onnx.ModelProto, single: float) -> float:
    halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return HALF if halves else single


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_prepared_model_computes_the_same_and_shows_its_weights(path: Path) -> None:
    graph = load(path)
    run = traced(graph, PREPARE)
    prepared, original = to_proto(run.graph), to_proto(graph)
    feed = feed_of(original)
    if feed is not None:
        folded = any(done.step.name == "fold-batch-norm" and done.modified for done in run.trace)
        tolerance = tolerance_of(original, FOLDED) if folded else 0.0
        assert_same_outputs(outputs_of(original, feed), outputs_of(prepared, feed), tolerance)
    assert not any(node.op == "Constant" for node in run.graph.nodes)
    names = Counter(node.name for scope in scopes(run.graph) for node in scope.nodes)
    assert "" not in names
    assert set(names.values()) <= {1}
    assert not hidden_weights(prepared.graph)
    assert prepared.ByteSize() <= 1.04 * original.ByteSize()  # names, and biases that were shared
    again = traced(load(path), PREPARE)
    assert to_proto(again.graph).SerializeToString(deterministic=True) == prepared.SerializeToString(deterministic=True)
    assert not any(done.modified for done in traced(run.graph, PREPARE).trace)


def hidden_weights(graph: onnx.GraphProto) -> list[str]:
    """Layers whose weight is computed, but from constants alone; integers behind a DequantizeLinear are not hidden."""
    known = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" and all(name in known for name in node.input if name):
            known.update(node.output)
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            computed = node.input[1] in known and all(node.input[1] != tensor.name for tensor in graph.initializer)
            found += [node.name] if computed else []
    return found


@pytest.mark.parametrize(("path", "to"), RAISES)
def test_a_raised_model_computes_the_same_under_the_same_names(path: Path, to: int) -> None:
    prepared = traced(load(path), PREPARE).graph
    raised = traced(prepared, raise_to(to)).graph
    assert raised.opset >= to
    assert {node.name for node in prepared.nodes} <= {node.name for node in raised.nodes}
    written = {tensor.name for node in raised.nodes for tensor in node.outputs}
    assert {tensor.name for node in prepared.nodes for tensor in node.outputs} <= written
    before, after = to_proto(prepared), to_proto(raised)
    assert after.metadata_props == before.metadata_props
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output) or before.ir_version < 4
    feed = feed_of(before)
    if feed is not None:
        assert_same_outputs(outputs_of(before, feed), outputs_of(after, feed), tolerance_of(before, RAISED))


def test_the_digits_models_answer_the_same_on_real_images() -> None:
    data = np.load(OWN[0].parent / "digits_evaluation.npz")
    for path in OWN:
        graph = load(path)
        name = graph.inputs[0].name
        feed = {name: data[name][:64]}
        before, after = outputs_of(graph, feed), outputs_of(traced(graph, PREPARE).graph, feed)
        assert_same_outputs(before, after, FOLDED)
        for output, values in before.items():
            np.testing.assert_array_equal(after[output].argmax(-1), values.argmax(-1))


# ---- onnx's operator cases -----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_evaluated_operators_give_what_the_runtime_gives() -> None:
    """Constant folding against ONNX Runtime, on every case of every operator that is folded."""
    compared: Counter[str] = Counter()
    for case in operator_cases():
        model = case.model
        inputs = [np.asarray(value) for value in case.data_sets[0][0] if isinstance(value, np.ndarray | np.generic)]
        if len(model.graph.node) != 1 or len(inputs) != len(model.graph.input):
            continue
        feed = dict(zip((value.name for value in model.graph.input), inputs, strict=True))
        frozen = onnx.ModelProto()
        frozen.CopyFrom(model)
        del frozen.graph.input[:]
        try:
            frozen.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in feed.items())
            expected = Session(model, SessionOptions("none")).run(feed)
        except (LcpaqError, ValueError, TypeError):
            continue  # no kernel, or not a tensor
        graph = load(frozen)
        evaluation = evaluate(graph, graph.nodes[0], SizeLimit(1e9, 0))
        if evaluation.reason:
            continue
        actual = dict(zip(expected, evaluation.values, strict=True))
        # 1e-6 of the largest magnitude: sums and transcendental functions may differ in the last places.
        assert_same_outputs(expected, actual, 1e-6)
        compared[graph.nodes[0].op] += 1
    # onnx 1.23.2 and ONNX Runtime 1.32: 438 cases of 75 operators.
    assert sum(compared.values()) > 300
    assert len(compared) > 60


# ---- random graphs --------------------------------------------------------------------------------------------------
@st.composite
def expressions(draw: st.DrawFn) -> Graph:
    """float[2,2] tensors: constants in all forms, copies, arithmetic, Ifs with constant and fed conditions."""
    known, numbers = ["x", "k"], st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0])
    lines: list[str] = []

    def expression(source: str) -> str:
        other = draw(st.sampled_from(known))
        return draw(
            st.sampled_from(
                [
                    *(f"{op}({source})" for op in ("Identity", "Transpose", "Concat<axis=0>")),
                    *(f"{op}({source}, {other})" for op in ("Add", "Sub", "Mul")),
                    f"Where(on, {source}, {other})",
                ]
            )
        )

    for index in range(draw(st.integers(1, 9))):
        name, source = f"t{index}", draw(st.sampled_from(known))
        kind = draw(st.sampled_from(["constant", "plain", "plain", "if"]))
        if kind == "constant":
            values = ",".join(str(draw(numbers)) for _ in range(4))
            lines.append(f"{name} = Constant<value = float[2,2] {{{values}}}>()")
        elif kind == "plain":
            lines.append(f"{name} = {expression(source)}")
        else:
            condition = draw(st.sampled_from(["on", "off", "fed"]))
            branches = [
                f"{branch}_branch = {branch}{index} () => (float[2,2] r{branch}{index})"
                f" {{ m{index} = {expression(source)} r{branch}{index} = {expression(f'm{index}')} }}"
                for branch in ("then", "else")
            ]
            lines.append(f"{name} = If({condition}) <{', '.join(branches)}>")
        known.append(name)
    returned = sorted(draw(st.sets(st.sampled_from(known[2:]), max_size=2)) | {known[-1]})
    outputs = ", ".join(f"float[2,2] {name}" for name in returned)
    return parse(
        f"g (float[2,2] x, bool fed) => ({outputs})"
        f" <float[2,2] k = {{1,2,3,4}}, bool on = {{1}}, bool off = {{0}}> {{ {' '.join(lines)} }}"
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(expressions())
def test_random_expressions_compute_the_same_bits(graph: Graph) -> None:
    x = np.array([[0.1, -3.0], [7.5, 1e-3]], np.float32)
    result = rewrite(graph, PREPARE, [{"x": x, "fed": np.array(flag)} for flag in (True, False)])
    kept = [node for node in result.nodes if node.op == "If"]
    assert all(node.inputs[0].name == "fed" for node in kept)


def test_what_a_branch_computes_from_constants_is_folded_once_it_is_inlined() -> None:
    graph = parse(
        """g (float[1,2] x) => (float[1,2] y) <bool on = {1}, float[2,2] w = {1,2,3,4}>
        { off = Not(on)
          y = If(off) <then_branch = t () => (float[1,2] a) { a = Neg(x) },
            else_branch = e () => (float[1,2] b) { t = Transpose(w) b = MatMul(x, t) }> }"""
    )
    result = rewrite(graph, PREPARE, [{"x": np.array([[1.0, -2.0]], np.float32)}])
    assert [node.op for node in result.nodes] == ["MatMul"]
    assert list(constants(result)) == ["t"]


def test_notes_name_the_node_even_if_it_had_no_name() -> None:
    node = helper.make_node("RandomNormal", [], ["r"], shape=[2])
    body = helper.make_graph(
        [node, helper.make_node("DequantizeLinear", ["q", "s"], ["d"]), helper.make_node("Add", ["r", "d"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.ones(2, np.int8), "q"), numpy_helper.from_array(np.float32(1), "s")],
    )
    graph = load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    trace = traced(graph, [CanonicalNames(), FoldConstants()]).trace
    assert trace[1].result is not None
    assert [note.node for note in trace[1].result.notes] == ["DequantizeLinear:d"]
