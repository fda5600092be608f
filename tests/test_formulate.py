"""The allocation problem that tables and a target make: what may be chosen, and what goes together."""

from __future__ import annotations

from itertools import pairwise

import pytest
from planning_case import VNNI, formulation, widest_assignment

from lcpaq_onnx.allocation.allocate import allocate
from lcpaq_onnx.allocation.pareto import pareto
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.formulate import activation_decision

MODELS = ("digits_resnet", "digits_mobile", "digits_vit")
TARGETS = (VNNI, "onnxruntime-cpu-x86_64-avx2", "generic-int8")
QUICK = [("digits_resnet", VNNI), ("digits_resnet", "generic-int8"), ("digits_vit", "generic-int8")]
SLOW = [(name, target) for name in MODELS for target in TARGETS if (name, target) not in QUICK]


def allowed(weights: list[int] | None = None, activations: list[int] | None = None) -> Allowed:
    return Allowed(
        None if weights is None else frozenset(weights), None if activations is None else frozenset(activations)
    )


@pytest.mark.parametrize(
    ("name", "target"), [*QUICK, *(pytest.param(*values, marks=pytest.mark.slow) for values in SLOW)]
)
def test_allocations_keep_every_rule(name: str, target: str) -> None:
    problem = formulation(target, name=name).problem()
    for objective in ("error", "latency", "size") if target == VNNI and name == "digits_resnet" else ("latency",):
        allocation = allocate(problem, (), (objective,))
        assert problem.violations(allocation.assignment) == ()
        assert problem.evaluate(allocation.assignment) == allocation.totals
    small = allocate(problem, (Budget("size", 0.4, "relative"),), ("error",))
    assert problem.violations(small.assignment) == ()
    assert small.totals.size_bytes <= 0.4 * problem.reference.size_bytes


def test_all_in_float_is_legal_and_costs_the_reference() -> None:
    problem = formulation().problem()
    assignment = widest_assignment(problem)
    assert problem.violations(assignment) == ()
    totals = problem.evaluate(assignment)
    assert totals.loss == totals.squared_error == 0
    assert totals.latency_us == pytest.approx(problem.reference.latency_us)
    assert totals.bops == problem.reference.bops
    assert totals.peak_memory_bytes == problem.reference.peak_memory_bytes


def test_without_budget_least_error_is_all_float() -> None:
    problem = formulation().problem()
    allocation = allocate(problem, (), ("error",))
    assert allocation.totals.loss == 0
    assert {allocation.assignment[layer.name] for layer in formulation().structure.layers} == {"f32"}
    assert allocation.proved_optimal


def test_integer_layers_stand_between_eight_bit_tensors() -> None:
    f = formulation()
    chosen = allocate(f.problem(), (), ("latency",)).assignment
    group_of = f.structure.group_of()
    integer = [layer for layer in f.structure.layers if chosen[layer.name].endswith("a8")]
    assert integer
    for layer in integer:
        assert chosen[activation_decision(group_of[layer.input])] == "a8"
        if f.target.needs_quantized_output(layer.op):
            assert chosen[activation_decision(group_of[layer.output])] == "a8"


def test_breaking_a_requirement_is_seen() -> None:
    f = formulation()
    problem = f.problem()
    assignment = widest_assignment(problem)
    layer = f.structure.layers[0]
    assignment[layer.name] = "w8a8"
    (first, *_) = problem.violations(assignment)
    assert layer.name in first


@pytest.mark.parametrize(
    ("weights", "activations", "expected"),
    [
        ([8], [8], {"w8a8"}),
        ([8], [8, 32], {"f32", "w8", "w8a8"}),
        ([4, 8], [32], {"f32", "w4", "w8"}),
        (None, [8], {"w2a8", "w3a8", "w4a8", "w5a8", "w6a8", "w7a8", "w8a8"}),
    ],
)
def test_the_user_narrows_the_choice(
    weights: list[int] | None, activations: list[int] | None, expected: set[str]
) -> None:
    f = formulation(allowed=allowed(weights, activations))
    conv = next(layer for layer in f.structure.layers if layer.op == "Conv")
    stored = {str(LayerFormat.parse(text)) for text in f.costs.layers[conv.name]}
    assert {str(format) for format in f.layer_formats(conv)} == expected & stored


def test_nothing_allowed_leaves_float() -> None:
    f = formulation(allowed=allowed([16], [8]))
    for layer in f.structure.layers:
        assert f.layer_formats(layer) == (LayerFormat(),)


def test_frontier_errors_fall_as_sizes_grow() -> None:
    problem = formulation().problem()
    points = pareto(problem, "size", (), 6)
    assert len(points) >= 3
    for smaller, larger in pairwise(points):
        assert smaller.totals.size_bytes < larger.totals.size_bytes
        assert smaller.totals.loss > larger.totals.loss
        assert problem.violations(smaller.assignment) == ()
