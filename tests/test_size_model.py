"""Predicted bytes against the bytes of files: exactly in total, from above decision by decision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser
from quantizing import UINT8, Prepared, emit, plan_of, prepare, random_model, random_plan

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.size_model import SizeModel, StoredLayer
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.provenance import model_metadata

MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
SEEDS = st.integers(0, 10_000)
FAST = settings(deadline=None, max_examples=40, derandomize=True)


def size_model(prepared: Prepared, plan: Plan) -> SizeModel:
    metadata = model_metadata(plan.target, "0" * 64)
    return SizeModel(prepared.graph, prepared.structure, prepared.movers, metadata)


def stored_layers(plan: Plan) -> dict[str, StoredLayer]:
    return {
        layer.name: StoredLayer(
            weight=None if layer.weight_format == "f32" else layer.qformat,
            storage=layer.storage,
            with_scale_only=layer.layer_format.is_folded,
            integer_bias=layer.bias_format == "int32",
            isolated=layer.isolate_input,
        )
        for layer in plan.layers
    }


def predicted_bytes(prepared: Prepared, plan: Plan) -> int:
    channels = {layer.name: layer.input_channels for layer in plan.layers if layer.isolate_input}
    groups = {group.name: group.qformat for group in plan.activations}
    return size_model(prepared, plan).total(stored_layers(plan), groups, channels)


def summed_bytes(prepared: Prepared, plan: Plan) -> int:
    """What an integer linear programme adds up."""
    sizes, stored = size_model(prepared, plan), stored_layers(plan)
    formats = {group.name: group.qformat for group in plan.activations}
    total = sizes.fixed_bytes + sum(sizes.layer_bytes(name, layer) for name, layer in stored.items())
    for group in prepared.structure.groups:
        if (format := formats[group.name]) is not None:
            total += sizes.group_bytes(group, format)
    for layer in plan.layers:
        if layer.isolate_input:
            total += sizes.isolated_bytes(layer.name, layer.input_channels, QFormat(bits=16))
    packed = {layer.qformat.bits for layer in plan.layers if layer.storage == "packed-bytes"}
    return total + sum(sizes.blob_bytes(bits) for bits in packed)


def file_bytes(prepared: Prepared, plan: Plan, folder: Path) -> int:
    path = folder / "emitted.onnx"
    graph_io.save(emit(prepared, plan), path)
    return path.stat().st_size


@FAST
@given(model_seed=SEEDS, plan_seed=SEEDS, opset=st.sampled_from([21, 25]))
def test_total_is_the_size_on_disk(
    tmp_path_factory: pytest.TempPathFactory, model_seed: int, plan_seed: int, opset: int
) -> None:
    prepared = prepare(random_model(model_seed, opset=opset))
    plan = random_plan(prepared, plan_seed, opset=opset)
    folder = tmp_path_factory.getbasetemp()
    assert predicted_bytes(prepared, plan) == file_bytes(prepared, plan, folder)


@FAST
@given(model_seed=SEEDS, plan_seed=SEEDS)
def test_the_sum_over_decisions_is_a_close_upper_bound(model_seed: int, plan_seed: int) -> None:
    prepared = prepare(random_model(model_seed))
    plan = random_plan(prepared, plan_seed)
    exact, summed = predicted_bytes(prepared, plan), summed_bytes(prepared, plan)
    assert exact <= summed
    # The slack that covers growing length prefixes: 48 bytes for each packed width, beside them one byte for each
    # changed node, one for the model, and what a Split of one piece would have cost.
    packed = [layer for layer in plan.layers if layer.storage == "packed-bytes"]
    widths = {layer.qformat.bits for layer in packed}
    nodes = len(prepared.graph.nodes) + 4
    longest_name = max(len(layer.weight) for layer in plan.layers)
    assert summed - exact <= (400 + 3 * longest_name) * len(widths) + 8 * nodes


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("seed", range(3))
def test_total_is_the_size_on_disk_of_real_models(tmp_path: Path, path: Path, seed: int) -> None:
    with np.load(path.parent / "digits_calibration.npz") as data:
        feed = {"image": data["image"][:2]}
    original = graph_io.load(path)
    for index, node in enumerate(original.nodes):
        node.name = node.name or f"node{index}"
    prepared = prepare(graph_io.to_proto(original), feed)
    opset = 25 if seed == 2 else 21
    plan = random_plan(prepared, seed, opset=opset)
    assert predicted_bytes(prepared, plan) == file_bytes(prepared, plan, tmp_path)
    assert predicted_bytes(prepared, plan) <= summed_bytes(prepared, plan)


def test_a_float_plan_adds_only_the_stamp(tmp_path: Path) -> None:
    prepared = prepare(random_model(3))
    plan = plan_of(prepared, {}, {})
    float_bytes = graph_io.serialized_size(prepared.graph)
    stamp_bytes = sum(len(k) + len(v) + 6 for k, v in model_metadata(plan.target, "0" * 64).items())
    assert predicted_bytes(prepared, plan) == float_bytes + stamp_bytes == file_bytes(prepared, plan, tmp_path)
    assert summed_bytes(prepared, plan) == predicted_bytes(prepared, plan)


@pytest.mark.parametrize("length", [120, 124, 125, 126, 127, 128, 16380, 16383])
def test_names_around_the_steps_of_a_length_prefix(tmp_path: Path, length: int) -> None:
    name = "x" * length
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[n, 3, 4, 4] {name}) => (float[n, 3, 4, 4] y)'
        f" {{ [add] {name}s = Add({name}, {name}) [relu] y = Relu({name}s) }}"
    )
    prepared = prepare(model, {name: np.ones((2, 3, 4, 4), np.float32)})
    plan = plan_of(prepared, {}, {group.name: UINT8 for group in prepared.structure.groups})
    assert predicted_bytes(prepared, plan) == file_bytes(prepared, plan, tmp_path)


def test_a_weight_that_another_operator_reads_too_is_stored_once(tmp_path: Path) -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (int64[n] token) => (float[n, 9] y)'
        " { [table] x = Gather(w, token) [scores] y = Gemm <transB = 1> (x, w) }"
    )
    weight = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    prepared = prepare(model, {"token": np.arange(3)})
    for text in ("f32", "w8", "w3"):
        plan = plan_of(prepared, {"scores": text}, {})
        assert predicted_bytes(prepared, plan) == file_bytes(prepared, plan, tmp_path)


def test_a_shared_weight_is_counted_once(tmp_path: Path) -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n, 8, 4, 4] x) => (float[n, 8, 4, 4] y)'
        " { [one] t = Conv(x, w) [two] y = Conv(t, w) }"
    )
    weight = np.random.default_rng(0).normal(size=(8, 8, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    prepared = prepare(model, {"x": np.ones((1, 8, 4, 4), np.float32)})
    for text in ("f32", "w8", "w4", "w3"):
        plan = plan_of(prepared, {"one": text, "two": text}, {})
        assert predicted_bytes(prepared, plan) == file_bytes(prepared, plan, tmp_path)
        assert predicted_bytes(prepared, plan) <= summed_bytes(prepared, plan)
