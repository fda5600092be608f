"""Embedding tables: which Gathers are layers, and that picking integers before scaling them changes no bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper, parser
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from quantizing import UINT8, Prepared, emit, plan_of, prepare

import lcpaq_onnx
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.size_model import SizeModel, StoredLayer
from lcpaq_onnx.graph.stored import stored_weight
from lcpaq_onnx.graph.written import read_model
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.provenance import model_metadata
from lcpaq_onnx.runtime.response import LayerResponse
from lcpaq_onnx.runtime.session import Session

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)


@dataclass(frozen=True)
class Case:
    """One table that ``shapes`` of indices look up, an Add and Relu behind the first of them."""

    rows: int
    columns: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: type
    bits: int
    opset: int
    is_quantized: bool
    seed: int
    long_name: int


CASES = st.builds(
    Case,
    rows=st.integers(1, 20),
    columns=st.sampled_from([(1,), (5,), (16,), (3, 4)]),
    shapes=st.lists(st.sampled_from([(), (3,), (2, 4), (1, 0), (2, 1, 3)]), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([np.int32, np.int64]),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]),
    opset=st.sampled_from([21, 25]),
    is_quantized=st.booleans(),
    seed=st.integers(0, 1000),
    # The length of a node's text takes another byte from 128 on.
    long_name=st.sampled_from([1, 20, *range(90, 128), 16300]),
)


def model_of(case: Case) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    rng = np.random.default_rng(case.seed)
    table = rng.normal(size=(case.rows, *case.columns)).astype(np.float32)
    # Negative indices count from the end (Gather-13).
    feed = {f"i{k}": rng.integers(-case.rows, case.rows, s).astype(case.dtype) for k, s in enumerate(case.shapes)}
    first = "y" * case.long_name
    nodes = [make_node("Gather", ["t", n], [f"{first}{k}"], f"gather{k}") for k, n in enumerate(feed)]
    nodes += [make_node("Add", [f"{first}0", "one"], ["sum"]), make_node("Relu", ["sum"], ["z"])]
    kind = TensorProto.INT32 if case.dtype is np.int32 else TensorProto.INT64
    results = ["z", *(f"{first}{k}" for k in range(1, len(feed)))]
    ranks = [len(case.columns) + len(shape) for shape in case.shapes]
    graph = make_graph(
        nodes,
        "tables",
        [make_tensor_value_info(name, kind, value.shape) for name, value in feed.items()],
        [make_tensor_value_info(n, TensorProto.FLOAT, [None] * r) for n, r in zip(results, ranks, strict=True)],
        [numpy_helper.from_array(table, "t"), numpy_helper.from_array(np.ones((), np.float32), "one")],
    )
    ir_version = 10 if case.opset < 25 else 13
    return make_model(graph, opset_imports=[make_opsetid("", case.opset)], ir_version=ir_version), feed


def sizes(prepared: Prepared, plan: Plan) -> tuple[int, int]:
    """Predicted bytes: exact, and added up over decisions."""
    stored = {
        layer.name: StoredLayer(
            weight=None if layer.weight_format == "f32" else layer.qformat,
            storage=layer.storage,
            with_scale_only=layer.layer_format.is_folded,
        )
        for layer in plan.layers
    }
    model = SizeModel(prepared.graph, prepared.structure, prepared.movers, model_metadata(plan.target, "0" * 64))
    groups = {group.name: group.qformat for group in plan.activations}
    summed = model.fixed_bytes + sum(model.layer_bytes(name, layer) for name, layer in stored.items())
    summed += sum(
        model.group_bytes(group, format) for group in prepared.structure.groups if (format := groups[group.name])
    )
    summed += sum(
        model.blob_bytes(bits) for bits in {p.qformat.bits for p in plan.layers if p.storage == "packed-bytes"}
    )
    return model.total(stored, groups, {}), summed


@SETTINGS
@given(CASES)
def test_rows_are_the_rounded_tables_rows_and_the_file_has_the_predicted_size(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    model, feed = model_of(case)
    prepared = prepare(model, feed)
    names = [layer.name for layer in prepared.structure.layers]
    assert names == [f"gather{k}" for k in range(len(case.shapes))]
    assert all(layer.is_lookup and layer.channel_axis == 0 for layer in prepared.structure.layers)
    # An empty tensor has no range.
    is_quantized = case.is_quantized and all(0 not in shape for shape in case.shapes)
    groups = {group.name: UINT8 for group in prepared.structure.groups} if is_quantized else {}
    plan = plan_of(prepared, dict.fromkeys(names, f"w{case.bits}"), groups, opset=case.opset)
    path = tmp_path_factory.getbasetemp() / "tables.onnx"
    graph_io.save(emit(prepared, plan), path)

    exact, summed = sizes(prepared, plan)
    assert path.stat().st_size == exact <= summed
    written = read_model(path)
    assert all(written.by_name[name].inputs[0] == "t/q" for name in names)
    stored = stored_weight(written, "t")
    assert stored is not None
    assert stored.has_scales_of(plan.layers[0].qformat)

    table = round_nearest(numpy_helper.to_array(model.graph.initializer[0]), plan.layers[0].qformat).dequantized()
    outputs = Session(path).run(feed)
    for k in range(1, len(case.shapes)):
        if not is_quantized:
            np.testing.assert_array_equal(outputs[f"{'y' * case.long_name}{k}"], table[feed[f"i{k}"]])
    expected = np.maximum(table[feed["i0"]] + np.float32(1), 0)
    step = sum(group.scale for group in plan.activations) if is_quantized else 0.0
    np.testing.assert_allclose(outputs["z"], expected, rtol=0, atol=1.01 * step)


def model_with(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def small(text: str, feed: dict[str, np.ndarray], **constants: np.ndarray) -> Prepared:
    return prepare(model_with(text, **constants), feed)


def tied() -> onnx.ModelProto:
    return model_with(
        "(int64[n] i) => (float[n, 9] y) { x = Gather(w, i) [scores] y = Gemm <transB = 1> (x, w) }", w=TABLE
    )


TABLE = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("(int64[n] i) => (float[n, 8] y, float[9, 8] w) { y = Gather(w, i) }", "the table is an output"),
        ("(int64[n] i) => (float y) { y = Gather <axis = 1> (w, i) }", "it picks columns"),
        ("(int64[n] i) => (float y, float z) { y = Gather(w, i) z = Relu(w) }", "another operator reads the table"),
        ("(int64[n] i) => (float y) { x = Gather(w, i) y = Gemm <transB = 1> (x, w) }", "tied to a product"),
    ],
)
def test_a_gather_is_no_layer_where(body: str, why: str) -> None:
    prepared = small(body, {"i": np.arange(3)}, w=TABLE)
    assert [layer.op for layer in prepared.structure.layers if layer.op == "Gather"] == [], why


def test_a_gather_from_an_activation_moves_data() -> None:
    prepared = small("(float[n, 4] x, int64[k] i) => (float y) { y = Gather(x, i) }", {
        "x": np.ones((2, 4), np.float32), "i": np.zeros(1, np.int64)
    })  # fmt: skip
    assert prepared.structure.layers == ()
    assert prepared.structure.operators[0].moves_data


def test_a_product_tied_to_a_table_is_not_to_dequantize_it_at_every_run(tmp_path: Path) -> None:
    prepared = prepare(tied(), {"i": np.arange(3)})
    (scores,) = prepared.structure.layers
    assert scores.has_other_readers
    graph_io.save(emit(prepared, plan_of(prepared, {"scores": "w4"}, {})), tmp_path / "tied.onnx")
    rounded = round_nearest(TABLE, plan_of(prepared, {"scores": "w4"}, {}).layers[0].qformat).dequantized()
    y = Session(tmp_path / "tied.onnx").run({"i": np.arange(3)})["y"]
    np.testing.assert_allclose(y, rounded[:3] @ rounded.T, rtol=1e-5, atol=1e-5)  # order of sums


@pytest.mark.parametrize(("activations", "expected"), [([8], "f32"), ([32], "w8")])
def test_a_product_tied_to_a_table_is_offered_no_format_that_dequantizes(activations: list[int], expected: str) -> None:
    done = lcpaq_onnx.quantize(tied(), [{"i": np.arange(3)}], weights=[8], activations=activations)
    assert [(layer.op, layer.format) for layer in done.report.layers] == [("Gemm", expected)]


@pytest.mark.parametrize("activations", [None, [8], [32]])
def test_a_table_is_stored_small_whatever_activations_may_be(activations: list[int] | None) -> None:
    model = model_with(
        "(int64[n, k] i) => (float[n, k, 5] y) { x = Gather(w, i) y = MatMul(x, p) }",
        w=np.tile(TABLE, (20, 1)),
        p=TABLE[:8, :5],
    )
    feeds = [{"i": np.arange(4)[None] + 30 * k} for k in range(5)]
    done = lcpaq_onnx.quantize(model, feeds, activations=activations)
    assert {layer.op: (layer.format, layer.kernel) for layer in done.report.layers}["Gather"] == ("w8", "Gather")
    assert all(check.passed for check in done.report.checks), done.report.checks


def test_sensitivities_of_a_table_are_measured() -> None:
    """A small budget has to be traded between the table and the product."""
    rng = np.random.default_rng(0)
    table, product = (rng.normal(size=shape).astype(np.float32) for shape in [(64, 16), (16, 64)])
    model = model_with(
        "(int64[n, k] i) => (float[n, k, 64] y) { x = Gather(w, i) y = MatMul(x, p) }", w=table, p=product
    )
    feeds = [{"i": rng.integers(0, 64, (1, 6))} for _ in range(16)]
    done = lcpaq_onnx.quantize(model, feeds, budget="size<=0.4x", activations=[32])
    layers = {layer.op: layer for layer in done.report.layers}
    assert all(layer.format != "f32" and layer.loss > 0 for layer in layers.values())
    assert all(check.passed for check in done.report.checks), done.report.checks


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_the_response_to_a_change_of_the_table_is_the_changes_rows(draws: int) -> None:
    rng = np.random.default_rng(0)
    change = rng.normal(size=(draws, 7, 3)).astype(np.float32)
    indices = rng.integers(0, 7, (4, 5))
    found = LayerResponse("Gather", {})(indices.astype(np.float32), change)
    expected = np.stack([change[sample * draws // 4][row] for sample, row in enumerate(indices)])
    np.testing.assert_array_equal(found, expected)
