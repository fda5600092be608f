"""Which plan is made for what the user asked, with errors measured on the emitted model."""

from __future__ import annotations

import functools

import pytest
from planning_case import CALIBRATION, MODELS, VNNI, planner

from lcpaq_onnx import compiler
from lcpaq_onnx.budget import Budget, parse_budgets
from lcpaq_onnx.errors import BudgetError
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import SilentProgress
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.passes import QUANTIZE, raise_to
from lcpaq_onnx.planning.bench import Bench, Settings, SourceModel
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.goal import Goal, plan_for
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.strategy import (
    DEFAULT_AGREEMENT,
    DEFAULT_RELATIVE_ERROR,
    Outcome,
    search_plan,
)
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.targets.loader import load as load_target


@functools.cache
def bench() -> Bench:
    path = MODELS["digits_resnet"]
    source = graph_io.load(path)
    data = open_calibration(CALIBRATION, Session(path).inputs, samples=32)
    original = SourceModel(graph_io.content_sha256(source), path.stat().st_size)
    settings = Settings(sensitivity_samples=32)
    return Bench(compiler.prepare(source), original, data, settings, SilentProgress(), Resources())


def emit(graph: graph_io.Graph, plan: Plan) -> graph_io.Graph:
    return run_pipeline((*raise_to(plan.opset), *QUANTIZE), PassContext.of(graph, bench().inputs, plan)).graph


def search(*budgets: str, allowed: Allowed = Allowed(), objective: str | None = None) -> Outcome:  # noqa: B008
    goal = Goal(parse_budgets(budgets), objective, allowed)  # type: ignore[arg-type]
    return search_plan(bench().graph, bench(), load_target(VNNI), goal, emit)


def test_the_default_is_fast_and_stays_within_its_thresholds() -> None:
    outcome = search()
    assert outcome.plan.budgets == ()
    assert outcome.measured.relative_error <= DEFAULT_RELATIVE_ERROR
    assert outcome.measured.agreement is not None
    assert outcome.measured.agreement >= DEFAULT_AGREEMENT
    assert outcome.plan.predicted.latency_us < outcome.plan.predicted.float_latency_us
    assert outcome.measured.samples == 32


def test_the_default_falls_back_to_less_error_where_the_fastest_plan_has_too_much() -> None:
    outcome = search(allowed=Allowed(frozenset([3]), None))
    assert outcome.measured.relative_error <= DEFAULT_RELATIVE_ERROR
    assert outcome.plan.budgets == ()
    # Three bits everywhere would be faster, and far off.
    everywhere = planner(allowed=Allowed(frozenset([3]), None)).plan((), ("latency", "size"))
    assert bench().error_of(emit(bench().graph, everywhere)).relative_error > DEFAULT_RELATIVE_ERROR


@pytest.mark.parametrize("limit", ["error<=2%", "error<=0.001"])
def test_an_error_budget_is_met_by_the_measured_error(limit: str) -> None:
    outcome = search(limit)
    budget = Budget.parse(limit)
    found = 100 * outcome.measured.relative_error if budget.unit == "percent" else outcome.measured.loss
    assert found <= budget.limit
    assert outcome.plan.budgets == (str(budget),)
    measured = bench().error_of(outcome.graph)
    assert measured == outcome.measured


@pytest.mark.slow
def test_more_error_buys_a_smaller_or_faster_file() -> None:
    loose, tight = search("error<=4%").plan.predicted, search("error<=0.5%").plan.predicted
    assert (loose.latency_us, loose.size_bytes) <= (tight.latency_us * 1.001, tight.size_bytes)
    assert loose.size_bytes < tight.size_bytes


def test_an_error_that_cannot_be_had_is_refused_with_the_least() -> None:
    with pytest.raises(BudgetError):
        search("error<=0.01%", "size<=0.2x")


def test_error_and_size_budgets_hold_together() -> None:
    outcome = search("error<=5%", "size<=0.25x")
    assert outcome.measured.relative_error <= 0.05
    assert outcome.plan.predicted.size_bytes <= 0.25 * MODELS["digits_resnet"].stat().st_size


@pytest.mark.slow
def test_least_error_gives_up_no_speed_that_nobody_can_see() -> None:
    goal = Goal(parse_budgets(["size<=0.3x"]), None, Allowed())
    chosen = plan_for(planner(), goal).predicted
    least = planner().plan(goal.budgets, ("error", "latency")).predicted
    assert chosen.latency_us <= least.latency_us
    assert chosen.relative_error is not None
    assert least.relative_error is not None
    assert chosen.relative_error <= max(0.01, 1.11 * least.relative_error)
