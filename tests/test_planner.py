"""Plans from saved measurements: they keep budgets and the user's choice, and come out the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from planning_case import CALIBRATION, MODELS, VNNI, formulation, measurements, planner, prepared
from pydantic import TypeAdapter

from lcpaq_onnx import compiler
from lcpaq_onnx.artefacts import read_measurements, write_measurements
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.errors import BudgetError, LcpaqError, UsageError
from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.numeric.rounding import round_nearest
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.tables import Measurements

RESNET = MODELS["digits_resnet"]


def plan(**changes: object) -> Plan:
    """A plan for the residual network; the same request is solved once."""
    key = repr(sorted(changes.items()))
    if key not in _PLANS:
        _PLANS[key] = compiler.allocate(RESNET, measurements(), **changes)  # type: ignore[arg-type]
    return _PLANS[key]


_PLANS: dict[str, Plan] = {}


def formats(made: Plan) -> set[str]:
    return {layer.format for layer in made.layers}


@pytest.mark.parametrize("budget", ["size<=0.25x", "size<=50kB"])
def test_a_size_budget_is_kept_to_the_byte_on_disk(tmp_path: Path, budget: str) -> None:
    made = plan(budget=budget)
    path = tmp_path / "small.onnx"
    graph_io.save(compiler.apply(RESNET, made, CALIBRATION, samples=32), path)
    assert path.stat().st_size == made.predicted.size_bytes
    limit = Budget.parse(budget)
    whole = RESNET.stat().st_size if limit.unit == "relative" else 1
    assert made.predicted.size_bytes <= limit.limit * whole
    # Room that is left is smaller than a step: one layer a bit wider.
    assert made.predicted.size_bytes >= 0.9 * limit.limit * whole
    assert made.budgets == (str(limit),)


def test_objective_error_without_budget_is_all_float() -> None:
    made = plan(objective="error")
    assert formats(made) == {"f32"}
    assert made.predicted.relative_error == 0
    assert all(group.format == "f32" for group in made.activations)


def test_objective_size_is_the_smallest_of_all() -> None:
    smallest = plan(objective="size")
    assert smallest.predicted.size_bytes <= plan(budget="size<=50kB").predicted.size_bytes
    with pytest.raises(BudgetError):
        plan(budget=f"size<={smallest.predicted.size_bytes - 200}B")


def test_eight_bits_everywhere_when_that_is_all_that_is_allowed() -> None:
    made = plan(weights=[8], activations=[8])
    assert formats(made) == {"w8a8"}
    assert {layer.executed for layer in made.layers} == {"int8"}
    assert all(layer.bias_format in ("int32", None) for layer in made.layers)
    assert not any(layer.isolate_input for layer in made.layers)


def test_a_width_that_the_target_lacks_is_refused() -> None:
    with pytest.raises(LcpaqError, match="9-bit"):
        plan(weights=[9])


@pytest.mark.parametrize(
    ("weights", "opset"),
    [([8], 17), ([3], 17), ([4], 21), ([4, 8], 21), ([2], 25)],
    ids=["plain", "bytes", "int4", "int4-or-8", "int2"],
)
def test_the_file_has_the_lowest_opset_that_expresses_the_plan(weights: list[int], opset: int) -> None:
    # The model itself is of opset 17. All layers are quantized, so that the narrow widths are used.
    made = plan(weights=weights, activations=[8], objective="size")
    assert {LayerFormat.parse(text).weight_bits for text in formats(made)} <= set(weights)
    assert made.opset == opset
    emitted = graph_io.to_proto(compiler.apply(RESNET, made, CALIBRATION, samples=32))
    assert next(entry.version for entry in emitted.opset_import if entry.domain == "") == opset
    assert emitted.ir_version >= made.ir_version


def test_widths_that_were_not_chosen_do_not_raise_the_opset() -> None:
    assert plan(objective="error").opset == 17
    assert planner().plan((), ("latency", "error")).opset == 17


def test_measurements_survive_json_and_give_the_same_plan(tmp_path: Path) -> None:
    adapter = TypeAdapter(Measurements)
    again = adapter.validate_json(adapter.dump_json(measurements()))
    assert again == measurements()
    write_measurements(measurements(), tmp_path / "net.analysis.json")
    read = read_measurements(tmp_path / "net.analysis.json")
    for made in (again, read):
        planned = compiler.allocate(RESNET, made, budget="size<=0.25x", objective="error")
        assert planned.to_json() == plan(budget="size<=0.25x", objective="error").to_json()


def test_measuring_again_gives_the_same_figures() -> None:
    settings = compiler.Settings(sensitivity_samples=4)
    first, second = (
        compiler.analyze(RESNET, CALIBRATION, samples=4, settings=settings) for _ in range(2)
    )  # fmt: skip
    assert first == second


def test_a_plan_survives_json_and_gives_the_same_bytes() -> None:
    made = plan(budget="size<=0.25x")
    again = Plan.from_json(made.to_json())
    assert again == made
    files = [
        graph_io.to_proto(compiler.apply(RESNET, p, CALIBRATION, samples=32)).SerializeToString() for p in (made, again)
    ]
    assert files[0] == files[1]


def test_plans_and_measurements_of_another_model_are_refused() -> None:
    with pytest.raises(UsageError, match="another model"):
        compiler.allocate(MODELS["digits_vit"], measurements())
    with pytest.raises(UsageError, match="another model"):
        compiler.apply(MODELS["digits_vit"], plan(objective="error"))


def test_a_saturating_target_never_plans_eight_bits_where_pairs_can_saturate() -> None:
    made = planner("onnxruntime-cpu-x86_64-avx2").plan((), ("latency", "error"))
    model = graph_io.to_proto(prepared())
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    integer = [layer for layer in made.layers if layer.executed == "int8"]
    assert integer
    for layer in integer:
        rounded = round_nearest(weights[layer.weight], layer.qformat)
        assert layer.qformat.axis is not None
        rows = np.moveaxis(np.abs(rounded.integers.astype(int)), layer.qformat.axis, 0)
        for row in rows.reshape(len(rows), -1):
            largest = np.sort(row)[-2:]
            assert 255 * largest.sum() <= 32767, layer.name
    # Where nothing saturates, the same request gives eight bits to as many layers or more.
    vnni = [layer.format for layer in planner(VNNI).plan((), ("latency", "error")).layers]
    assert vnni.count("w8a8") >= max(1, sum(layer.format == "w8a8" for layer in made.layers))


def test_layers_explain_themselves() -> None:
    made = plan(budget="size<=0.25x")
    assert all(layer.reason for layer in made.layers)
    assert all(group.reason for group in made.activations)
    assert made.proof.optimal
    assert made.source_sha256 == measurements().source_sha256


@pytest.mark.slow
def test_the_frontier_falls_and_its_files_are_as_large_as_promised(tmp_path: Path) -> None:
    plans = compiler.frontier(RESNET, measurements(), points=4)
    sizes = [p.predicted.size_bytes for p in plans]
    errors = [p.predicted.relative_error or 0.0 for p in plans]
    assert sizes == sorted(set(sizes))
    assert errors == sorted(errors, reverse=True)
    for made in (plans[0], plans[-1]):
        path = tmp_path / "point.onnx"
        graph_io.save(compiler.apply(RESNET, made, CALIBRATION, samples=32), path)
        assert path.stat().st_size == made.predicted.size_bytes


def test_planner_and_allocate_agree() -> None:
    direct = planner(allowed=Allowed(frozenset([8]), frozenset([8]))).plan((), ("latency", "error"))
    assert {layer.format for layer in direct.layers} == formats(plan(weights=[8], activations=[8]))


def test_a_budget_on_bits_limits_the_mean_width() -> None:
    made = plan(budget="bits<=4", objective="error")
    count = {layer.weight: float(np.prod(layer.weight_shape)) for layer in formulation().structure.layers}
    width = {layer.weight: layer.layer_format.weight_bits or 32 for layer in made.layers}
    mean = sum(width[name] * count[name] for name in count) / sum(count.values())
    assert mean == pytest.approx(made.predicted.stored_bits, rel=1e-9)
    assert 3.9 < mean <= 4
    assert made.predicted.loss > plan(budget="bits<=6", objective="error").predicted.loss
