"""Rewrites that a plan may begin with: chosen by measurement, recorded, and replayed to the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lcpaq_onnx import compiler
from lcpaq_onnx.allocation.allocate import Objective
from lcpaq_onnx.budget import parse_budgets
from lcpaq_onnx.errors import PassError, UsageError
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import AnalysisInputs
from lcpaq_onnx.passes import MigrateOutliers, ScaleInputs
from lcpaq_onnx.planning.bench import Migration, Settings
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.goal import Goal
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.rewrites import candidates_for, is_better, is_worth_trying, rewritten
from lcpaq_onnx.planning.strategy import Outcome
from lcpaq_onnx.tables import Sensitivity
from lcpaq_onnx.targets.loader import load as load_target
from lcpaq_onnx.verification.measure import MeasuredError
from lcpaq_onnx.verification.report_text import render_text

MODELS = Path(__file__).resolve().parents[1] / "models"
VIT, RESNET = MODELS / "digits_vit.onnx", MODELS / "digits_resnet.onnx"
DATA = MODELS / "digits_calibration.npz"
SAMPLES = 16
SIGNS = np.where(np.arange(SAMPLES) % 2, 1.0, -1.0)
TARGET = load_target(compiler.DEFAULT_TARGET)
ANY = Allowed(None, None)


def quantized(model: Path, migration: Migration) -> compiler.Quantized:
    """In 8 bits, rounded to nearest, so that only rewrites look at data."""
    settings = Settings(rounding="nearest", migration=migration)
    return compiler.quantize(model, DATA, samples=SAMPLES, weights=[8], activations=[8], settings=settings)


@pytest.fixture(scope="module")
def moved() -> compiler.Quantized:
    return quantized(VIT, "always")


@pytest.fixture(scope="module")
def plain() -> compiler.Quantized:
    return quantized(VIT, "never")


# ---- what stands in plan and report ---------------------------------------------------------------------------------
def test_rewrites_stand_in_plan_and_report(moved: compiler.Quantized, tmp_path: Path) -> None:
    report = moved.report
    assert moved.plan.rewrites[0].startswith("migrate-outliers")
    assert report.passed
    assert report.rewrites == moved.plan.rewrites
    assert report.loss_without_rewrites is not None
    assert f"Rewrites: {moved.plan.rewrites[0]}" in render_text(report)
    path = tmp_path / "moved.onnx"
    moved.save(path)
    assert path.stat().st_size == moved.plan.predicted.size_bytes
    assert "lcpaq.plan" in {entry.key for entry in moved.model.metadata_props}


def test_plan_with_rewrites_replays_to_the_same_bytes(moved: compiler.Quantized) -> None:
    plan = Plan.from_json(moved.plan.to_json())
    again = compiler.apply(VIT, plan, DATA, samples=SAMPLES)
    assert graph_io.to_proto(again).SerializeToString(deterministic=True) == moved.model.SerializeToString(
        deterministic=True
    )


def test_rewrites_need_the_data_they_looked_at(moved: compiler.Quantized) -> None:
    with pytest.raises(UsageError, match="calibration data"):
        compiler.apply(VIT, moved.plan)
    with pytest.raises(UsageError, match="other calibration data"):
        compiler.apply(VIT, moved.plan, DATA, samples=SAMPLES - 1)


def test_without_migration_there_are_none(moved: compiler.Quantized, plain: compiler.Quantized) -> None:
    assert plain.plan.rewrites == plain.report.rewrites == ()
    assert plain.report.loss_without_rewrites is None
    assert "Rewrites" not in render_text(plain.report)
    assert moved.report.loss_without_rewrites == plain.report.measured.loss


def test_convolutional_models_are_left_alone() -> None:
    assert quantized(RESNET, "always").plan.rewrites == ()


def test_rewrites_of_a_plan_are_passes() -> None:
    graph = compiler.prepare(graph_io.load(VIT))
    assert rewritten(graph, (), AnalysisInputs()) is graph
    with pytest.raises(PassError, match="migrate-outlier"):
        rewritten(graph, ("migrate-outlier",), AnalysisInputs())


# ---- which ones to try ----------------------------------------------------------------------------------------------
def test_bits_expected_are_those_of_the_plan(moved: compiler.Quantized, plain: compiler.Quantized) -> None:
    """Of weights that multiply; compensated ones count one bit more."""
    from lcpaq_onnx.manager.analysis import AnalysisManager
    from lcpaq_onnx.passes import GraphStructure
    from lcpaq_onnx.runtime.calibration import open_calibration
    from lcpaq_onnx.runtime.declared import declared_inputs

    source = graph_io.load(VIT)
    data = open_calibration(DATA, declared_inputs(source), samples=1)
    structure = AnalysisManager(compiler.prepare(source), AnalysisInputs(calibration=data)).get(GraphStructure)
    counts = {layer.name: int(np.prod(layer.weight_shape)) for layer in structure.layers}

    low = {"weight_format": "int4:sym:axis=1"}

    def with_rounding(rounding: str) -> Plan:
        layers = tuple(layer.model_copy(update=low | {"rounding": rounding}) for layer in plain.plan.layers)
        return plain.plan.model_copy(update={"layers": layers})

    def expected(bits: int) -> tuple[object, ...]:
        return MigrateOutliers(weights=bits), ScaleInputs(weights=bits)

    assert candidates_for(structure, counts, with_rounding("nearest"), 8) == expected(4)
    assert candidates_for(structure, counts, with_rounding("compensated"), 8) == expected(5)


@pytest.mark.parametrize(
    ("budgets", "allowed", "has_sensitivity", "expected"),
    [
        ((), ANY, False, False),  # the fastest plan was good enough
        ((), ANY, True, True),
        ((), Allowed(None, frozenset({32})), True, False),
        (("error<=1%",), ANY, True, True),
        (("size<=0.5x",), ANY, True, True),  # some activation has 8 bits
        (("size<=0.5x",), Allowed(None, frozenset({16, 32})), True, False),
    ],
)
def test_only_8_bit_activations_are_a_reason(
    plain: compiler.Quantized, budgets: Sequence[str], allowed: Allowed, has_sensitivity: bool, expected: bool
) -> None:
    found = Sensitivity("auto", 8, 1, 1)
    outcome = _outcome(plain, sensitivity=found if has_sensitivity else None)
    assert is_worth_trying(outcome, TARGET, Goal(parse_budgets(budgets), None, allowed)) is expected


# ---- which outcome is better ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"latency_us": 50.0, "loss": 9.0}, True),
        ({"latency_us": 99.9, "loss": 9.0}, False),  # the same time and size: then the error counts
        ({"latency_us": 99.9, "size_bytes": 900, "loss": 9.0}, True),
        ({"latency_us": 100.5, "loss": 0.5}, True),
        ({"latency_us": 150.0, "loss": 0.5}, False),
    ],
)
def test_error_budget_wants_speed_then_size(plain: compiler.Quantized, found: dict[str, float], expected: bool) -> None:
    goal = Goal(parse_budgets(["error<=5%"]), None, ANY)
    assert is_better(_outcome(plain, **found), _outcome(plain), goal) is expected


@pytest.mark.parametrize(("objective", "expected"), [(None, True), ("error", True), ("latency", False)])
def test_least_error_is_worth_time_unless_time_comes_first(
    plain: compiler.Quantized, objective: Objective | None, expected: bool
) -> None:
    goal = Goal(parse_budgets(["size<=0.5x"]), objective, ANY)
    assert is_better(_outcome(plain, latency_us=150.0, loss=0.5), _outcome(plain), goal) is expected


@pytest.mark.parametrize(
    ("found", "other", "expected"),
    [
        ({"relative_error": 0.001, "latency_us": 150.0}, {"relative_error": 0.1}, True),
        ({"relative_error": 0.1, "latency_us": 50.0, "loss": 0.5}, {"relative_error": 0.001}, False),
        ({"relative_error": 0.001, "latency_us": 50.0}, {"relative_error": 0.001}, True),
        ({"relative_error": 0.1, "loss": 0.5}, {"relative_error": 0.1}, True),
        ({"relative_error": 0.1, "loss": 1.0, "latency_us": 50.0}, {"relative_error": 0.1}, False),
    ],
)
def test_default_goal_wants_what_is_good_enough_then_speed(
    plain: compiler.Quantized, found: dict[str, float], other: dict[str, float], expected: bool
) -> None:
    assert is_better(_outcome(plain, **found), _outcome(plain, **other), Goal((), None, ANY)) is expected


def test_a_single_bad_sample_does_not_hide_that_all_others_are_better(plain: compiler.Quantized) -> None:
    goal = Goal((), "error", ANY)
    few = np.full(SAMPLES, 1e-3)
    one_bad = np.r_[few[1:], 1.0]
    assert is_better(_outcome(plain, losses=few / 2), _outcome(plain, losses=one_bad), goal)
    # Better in one sample alone is chance.
    assert not is_better(_outcome(plain, losses=few), _outcome(plain, losses=one_bad), goal)


def _outcome(
    base: compiler.Quantized,
    *,
    latency_us: float = 100.0,
    size_bytes: float = 1000,
    loss: float = 1.0,
    relative_error: float = 0.02,
    losses: np.ndarray | None = None,
    sensitivity: Sensitivity | None = None,
) -> Outcome:
    totals = base.plan.predicted.model_copy(update={"latency_us": latency_us, "size_bytes": size_bytes})
    spread = loss + 0.1 * SIGNS if losses is None else losses
    measured = MeasuredError(losses=spread, relative_error=relative_error, agreement=None)
    return Outcome(base.graph, base.plan.model_copy(update={"predicted": totals}), measured, sensitivity)
