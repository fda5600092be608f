"""Which errors are measured: those that the answer turns on, and no more."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_case import CALIBRATION, MODELS, VNNI, prepared

from lcpaq_onnx.budget import parse_budgets
from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.manager.analysis import SilentProgress
from lcpaq_onnx.manager.pass_base import PassContext
from lcpaq_onnx.manager.pass_manager import run_pipeline
from lcpaq_onnx.passes import QUANTIZE, raise_to
from lcpaq_onnx.planning.bench import Bench, Estimator, Settings, SourceModel
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.goal import Goal
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.refinement import frontier_entries, full_analysis, next_to
from lcpaq_onnx.planning.strategy import Outcome, search_plan
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.tables import ErrorEntry, ErrorTable
from lcpaq_onnx.targets.loader import load as load_target

WIDTHS = (2, 4, 8)
SAMPLES = 32


# ---- neighbours -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bits", "expected"), [(2, {2, 3}), (3, {2, 3, 4}), (4, {3, 4, 8}), (8, {4, 8}), (5, set()), (16, set())]
)
def test_neighbours_are_the_next_widths_that_there_are(bits: int, expected: set[int]) -> None:
    """A width that cannot be chosen has none; the order of the widths does not matter."""
    assert next_to([("fc", bits)], (8, 2, 4, 3)) == {("fc", width) for width in expected}


def test_neighbours_of_several_layers_are_theirs_alone() -> None:
    assert next_to([("a", 2), ("b", 8)], WIDTHS) == {("a", 2), ("a", 4), ("b", 4), ("b", 8)}
    assert next_to([], WIDTHS) == frozenset()


# ---- the frontier ---------------------------------------------------------------------------------------------------
def table(losses: Mapping[str, tuple[float, ...]]) -> ErrorTable:
    """Layer → loss at each of ``WIDTHS``."""
    return ErrorTable(
        {
            name: {bits: ErrorEntry(loss, loss) for bits, loss in zip(WIDTHS, row, strict=True)}
            for name, row in losses.items()
        }
    )


def test_a_width_that_no_price_takes_is_not_on_the_frontier() -> None:
    # 'bent' at 4 bits lies above the line from 2 to 8: two bits more cost a lot and gain nothing. 'even' halves with
    # each bit, and every width has its price.
    losses = table({"bent": (1.0, 0.9, 0.0), "even": (1.0, 0.25, 0.015)})
    found = frontier_entries(losses, {"bent": 100, "even": 100}, WIDTHS)
    assert found == {("bent", 2), ("bent", 8), ("even", 2), ("even", 4), ("even", 8)}


def test_layers_meet_their_own_prices() -> None:
    """A small sensitive layer and a large dull one: some price takes each at each width."""
    losses = table({"small": (100.0, 10.0, 1.0), "large": (1e-3, 1e-4, 1e-5)})
    found = frontier_entries(losses, {"small": 10, "large": 1_000_000}, WIDTHS)
    assert found == {(name, bits) for name in ("small", "large") for bits in WIDTHS}


def test_layers_without_errors_or_an_empty_table_ask_for_nothing() -> None:
    assert frontier_entries(ErrorTable(), {"fc": 3}, WIDTHS) == frozenset()
    assert frontier_entries(table({"fc": (0.0, 0.0, 0.0)}), {"fc": 3}, WIDTHS) == frozenset()
    known = frontier_entries(table({"fc": (1.0, 0.1, 0.01)}), {"fc": 3, "unknown": 5}, WIDTHS)
    assert {name for name, _ in known} == {"fc"}


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1e3), st.floats(0.01, 0.9), st.floats(0.01, 0.9), st.integers(1, 10**6)),
        min_size=1,
        max_size=5,
    ),
    st.floats(1e-9, 1e3),
)
def test_what_any_price_takes_is_on_the_frontier_or_next_to_it(
    layers: list[tuple[float, float, float, int]], price: float
) -> None:
    """Prices are tried in steps; between two steps only neighbours on the frontier change places."""
    losses = table({f"l{i}": (a, a * b, a * b * c) for i, (a, b, c, _) in enumerate(layers)})
    weights = {f"l{i}": count for i, (_, _, _, count) in enumerate(layers)}
    found = frontier_entries(losses, weights, WIDTHS)
    for name, count in weights.items():
        taken = min(WIDTHS, key=lambda bits: losses.layers[name][bits].loss + price * count * bits)
        assert (name, taken) in next_to(found, WIDTHS)
        # The ends are always there: nothing else is taken at the highest and at the lowest price.
        assert {(name, 2), (name, 8)} <= found


# ---- on a network ---------------------------------------------------------------------------------------------------
@functools.cache
def bench(estimator: Estimator) -> Bench:
    path = MODELS["digits_resnet"]
    source = graph_io.load(path)
    # Behind the samples that errors are measured on there are some for moments.
    data = open_calibration(CALIBRATION, Session(path).inputs, samples=4 * SAMPLES)
    original = SourceModel(graph_io.content_sha256(source), path.stat().st_size)
    settings = Settings(estimator=estimator, sensitivity_samples=SAMPLES)
    return Bench(prepared(), original, data, settings, SilentProgress(), Resources())


def emit(graph: graph_io.Graph, plan: Plan) -> graph_io.Graph:
    return run_pipeline((*raise_to(plan.opset), *QUANTIZE), PassContext.of(graph, bench("auto").inputs, plan)).graph


def outcome(estimator: Estimator, budget: str) -> Outcome:
    """The plan of least error: without that objective, what nobody can see is given up for speed."""
    goal = Goal(parse_budgets([budget]), "error", Allowed())
    return search_plan(prepared(), bench(estimator), load_target(VNNI), goal, emit)


def predicted_loss(plan: Plan) -> float:
    """Of the plan's layers, by the table in which every entry is measured."""
    measured = bench("rounding-error")
    errors = measured.with_errors(measured.every_entry(None), SAMPLES).errors
    widths = {layer.name: layer.layer_format.weight_bits for layer in plan.layers}
    return sum(errors.layers[name][bits].loss for name, bits in widths.items() if bits is not None)


@pytest.mark.parametrize("budget", ["size<=0.3x", "size<=0.2x"])
def test_auto_measures_less_and_finds_what_measuring_everything_finds(budget: str) -> None:
    auto, everything = outcome("auto", budget), outcome("rounding-error", budget)
    assert auto.sensitivity is not None
    assert everything.sensitivity is not None
    assert everything.sensitivity.measured_entries == everything.sensitivity.entries
    assert auto.sensitivity.entries == everything.sensitivity.entries
    assert 0 < auto.sensitivity.measured_entries < 0.7 * auto.sensitivity.entries
    assert (auto.sensitivity.estimator, auto.sensitivity.note) == ("auto", "")
    # The same plan, or one as good; cross terms may have given up some of the sum for a lower measured loss.
    assert predicted_loss(auto.plan) <= (1.2 if auto.plan.proof.exchanged else 1.05) * predicted_loss(everything.plan)
    assert auto.measured.loss <= 1.25 * everything.measured.loss


def test_second_order_alone_measures_nothing() -> None:
    found = full_analysis(bench("hessian-diagonal")).sensitivity
    assert found is not None
    assert found.measured_entries == 0 or found.note


def test_the_full_analysis_measures_along_the_frontier() -> None:
    found = full_analysis(bench("auto"))
    assert found.sensitivity is not None
    assert 0 < found.sensitivity.measured_entries <= found.sensitivity.entries
    assert full_analysis(bench("auto")).errors == found.errors
