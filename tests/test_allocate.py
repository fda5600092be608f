"""The allocator against hand arithmetic and, on random problems with every kind of rule, against brute force."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from lcpaq_onnx.allocation import milp
from lcpaq_onnx.allocation.allocate import OBJECTIVE_COLUMNS, Objective, allocate
from lcpaq_onnx.allocation.infeasible import InfeasibleError
from lcpaq_onnx.allocation.optimum import meets
from lcpaq_onnx.allocation.problem import (
    AllocationProblem,
    AnyOf,
    Boundary,
    Conjunction,
    Decision,
    MemoryStep,
    Option,
    Reference,
    Requirement,
    Tie,
    Totals,
)
from lcpaq_onnx.budget import Budget, Dimension
from lcpaq_onnx.errors import BudgetError, UsageError

REFERENCE = Reference(size_bytes=1000, latency_us=1000.0, bops=1e6, peak_memory_bytes=1000)


def layer(name: str, *options: Option) -> Decision:
    return Decision(name, "layer", options)


def two_layers(**rules: tuple[object, ...]) -> AllocationProblem:
    """Layers a (100 weights) and b (200), 8 or 4 bits; the loss of 4 bits is 3 for a and 4 for b.

    bytes      a8 a4 b8  b4        a8+b8 = 300, a4+b8 = 250, a8+b4 = 200, a4+b4 = 150
    loss       0  3  0   4             0            3            4            7
    mean bits  of 300 weights          8            6.67         5.33         4
    latency µs 10 12 20  21           30           32           31           33
    """
    a = layer("a", Option("w8", 0, 0, 100, 10, 0, 8 / 3), Option("w4", 3, 3e-4, 50, 12, 0, 4 / 3))
    b = layer("b", Option("w8", 0, 0, 200, 20, 0, 16 / 3), Option("w4", 4, 4e-4, 100, 21, 0, 8 / 3))
    return AllocationProblem((a, b), REFERENCE, **rules)  # type: ignore[arg-type] # the tests' shorthand


def chosen(problem: AllocationProblem, *texts: str, objective: tuple[Objective, ...] = ("error",)) -> str:
    found = allocate(problem, [Budget.parse(text) for text in texts], objective)
    assert found.proved_optimal
    assert found.gap == 0
    assert found.totals == problem.evaluate(found.assignment)
    return " ".join(found.assignment.values())


@pytest.mark.parametrize(
    ("limit", "best"),
    [(300, "w8 w8"), (299, "w4 w8"), (250, "w4 w8"), (249, "w8 w4"), (200, "w8 w4"), (199, "w4 w4"), (150, "w4 w4")],
)
def test_size_budget_holds_to_the_byte(limit: int, best: str) -> None:
    assert chosen(two_layers(), f"size<={limit}B") == best


@pytest.mark.parametrize(
    ("limit", "best"), [("8", "w8 w8"), ("6.67", "w4 w8"), ("6.66", "w8 w4"), ("5.33", "w4 w4"), ("4", "w4 w4")]
)
def test_bits_are_the_mean_over_all_weights(limit: str, best: str) -> None:
    assert chosen(two_layers(), f"bits<={limit}") == best


def test_bits_that_cannot_be_had_name_the_least() -> None:
    with pytest.raises(InfeasibleError, match="the least bits that works is 4; held up by b") as caught:
        allocate(two_layers(), [Budget.parse("bits<=3.9")])
    assert str(caught.value.least[0].budget) == "bits<=4"
    (price,) = allocate(two_layers(), [Budget.parse("bits<=6.6")]).shadow_prices
    assert price.text == "+0.3 bits buys −25 % error"  # 6.9 leaves room for w4 w8
    assert price.unit == "loss/bit"


def test_one_byte_below_the_least_is_infeasible() -> None:
    with pytest.raises(InfeasibleError) as caught:
        allocate(two_layers(), [Budget.parse("size<=149B")])
    (least,) = caught.value.least
    assert least.value == 150
    assert str(least.budget) == "size<=150B"
    assert least.binding == ("b (w4)", "a (w4)")  # 100 bytes, then 50
    assert "150 bytes" in str(caught.value)


@pytest.mark.parametrize("shift", [0, 1])
def test_byte_edge_of_a_large_model(shift: int) -> None:
    """Half a gigabyte, odd sizes: the limit that a plan meets exactly is feasible, one byte less is another plan."""
    rng = np.random.default_rng(7)
    weights = rng.integers(1_000_000, 15_000_000, 60)
    sensitivity = rng.lognormal(0, 1, 60)
    problem = AllocationProblem(
        tuple(
            layer(
                f"l{i}",
                *(
                    Option(f"w{b}", float(4.0**-b * sensitivity[i]), 0, int(n * b // 8 + 17))
                    for b in (8, 6, 5, 4, 3, 2)
                ),
            )
            for i, n in enumerate(weights)
        ),
        REFERENCE,
    )
    first = allocate(problem, [Budget("size", float(weights.sum() * 0.55))])
    again = allocate(problem, [Budget("size", first.totals.size_bytes - shift)])
    assert again.totals.size_bytes <= first.totals.size_bytes - shift
    assert (again.assignment == first.assignment) == (shift == 0)


def test_no_budget_gives_the_widest_plan() -> None:
    assert chosen(two_layers()) == "w8 w8"


def test_relative_error_budget() -> None:
    # squared errors 3e-4 + 4e-4 = 7e-4, root 2.65 %; b alone 2 % exactly; a alone 1.73 %
    assert chosen(two_layers(), "error<=2.65%", objective=("size",)) == "w4 w4"
    assert chosen(two_layers(), "error<=2.64%", objective=("size",)) == "w8 w4"
    assert chosen(two_layers(), "error<=1.99%", objective=("size",)) == "w4 w8"


def test_loss_and_latency_budgets() -> None:
    assert chosen(two_layers(), "error<=4", objective=("size",)) == "w8 w4"
    assert chosen(two_layers(), "latency<=0.031x", "size<=200B") == "w8 w4"  # 31 µs of 1000
    assert chosen(two_layers(), "error<=4", objective=("latency", "size")) == "w8 w8"


def test_second_objective_decides_between_equals() -> None:
    slow, fast = Option("slow", 1, 0, 10, 9), Option("fast", 1, 0, 20, 5)
    problem = AllocationProblem((layer("a", slow, fast),), REFERENCE)
    assert chosen(problem, objective=("error", "latency")) == "fast"
    assert chosen(problem, objective=("error", "size")) == "slow"


def test_equal_plans_prefer_the_front_of_the_options() -> None:
    options = tuple(Option(name, 1, 0, 10, 1) for name in ("first", "second", "third"))
    problem = AllocationProblem(tuple(layer(f"l{i}", *options) for i in range(6)), REFERENCE)
    assert chosen(problem) == " ".join(["first"] * 6)


def test_conversion_cost_keeps_neighbours_alike() -> None:
    # a4+b8 (250 bytes, loss 3) now stores a 10 byte conversion; at 250 bytes a8+b4 (200, loss 4) is what is left.
    boundary = Boundary("a", ("w4",), "b", ("w8",), size_bytes=10, latency_us=5)
    assert chosen(two_layers(boundaries=(boundary,)), "size<=260B") == "w4 w8"
    assert chosen(two_layers(boundaries=(boundary,)), "size<=259B") == "w8 w4"


def test_peak_memory() -> None:
    # node x: 40 + a (60 | 30) = 100 | 70; node y: a + b = 60+50 | 30+50 | 60+25 | 30+25
    live_a = ("a", (("w8", 60), ("w4", 30)))
    live_b = ("b", (("w8", 50), ("w4", 25)))
    steps = (MemoryStep("x", 40, (live_a,)), MemoryStep("y", 0, (live_a, live_b)))
    problem = two_layers(memory_steps=steps)
    assert chosen(problem, "peak_memory<=110B") == "w8 w8"
    assert chosen(problem, "peak_memory<=109B") == "w4 w8"  # max(70, 80), loss 3; a8+b4 has max(100, 85), loss 4
    assert problem.evaluate({"a": "w8", "b": "w4"}).peak_memory_bytes == 100
    with pytest.raises(InfeasibleError) as caught:
        allocate(problem, [Budget.parse("peak_memory<=60B")])
    assert caught.value.least[0].value == 70
    assert caught.value.least[0].binding == ("a (w4)",)


def test_conflict_is_minimal_and_names_the_least_of_each() -> None:
    budgets = [Budget.parse(text) for text in ("latency<=1ms", "size<=200B", "error<=3")]
    with pytest.raises(InfeasibleError) as caught:
        allocate(two_layers(), budgets)
    assert caught.value.conflict == (budgets[1], budgets[2])
    # within 200 bytes the least loss is 4 (a8+b4); within a loss of 3 the least size is 250 (a4+b8)
    assert [(entry.budget.dimension, entry.value) for entry in caught.value.least] == [("size", 250), ("error", 4)]
    for text in ("size<=200B and error<=3 together", "size<=250B or error<=4", "(250 bytes)"):
        assert text in str(caught.value)


def test_relative_least_budget_is_rounded_up_so_that_it_works() -> None:
    problem = AllocationProblem((layer("a", Option("w8", 0, 0, 333_333)),), Reference(1_000_000, 1.0, 1.0, 1))
    with pytest.raises(InfeasibleError) as caught:
        allocate(problem, [Budget.parse("size<=0.3x")])
    assert str(caught.value.least[0].budget) == "size<=0.3334x"
    assert allocate(problem, [caught.value.least[0].budget]).totals.size_bytes == 333_333


def test_contradicting_rules_are_no_budget_conflict() -> None:
    rules = tuple(Requirement("a", (f,), "b", ()) for f in ("w8", "w4"))
    with pytest.raises(BudgetError, match="whatever the budget") as caught:
        allocate(two_layers(requirements=rules), [Budget.parse("size<=1KB")])
    assert not isinstance(caught.value, InfeasibleError)


def test_shadow_price_from_a_second_solve() -> None:
    # 250 bytes: a4+b8, loss 3. A twentieth is 12.5, one digit: 10 bytes, which buys nothing.
    (price,) = allocate(two_layers(), [Budget.parse("size<=250B")]).shadow_prices
    assert price.text == "+10B size buys nothing"
    # 296 bytes: +10 makes 306 >= 300, all 8 bit, loss 3 → 0. The relaxation pays b's loss: 4 per 100 bytes.
    (price,) = allocate(two_layers(), [Budget.parse("size<=296B")]).shadow_prices
    assert price.text == "+10B size buys −100 % error"
    assert price.unit == "loss/MB"
    assert price.per_unit == pytest.approx(min(3 / 50, 4 / 100) * 1e6)
    (price,) = allocate(two_layers(), [Budget.parse("size<=1KB")]).shadow_prices
    assert price.text == "+50B size buys nothing: the budget is not used up"


def test_three_formats_convert_at_different_costs() -> None:
    """Potts-like costs on a chain need the pair's joint choice; brute force is the judge."""
    formats = ("f32", "a16", "a8")
    decisions = tuple(
        Decision(
            f"t{i}", "activation", tuple(Option(f, [0, 1, 4][k], 0, 0, [9, 5, 2][k] + i) for k, f in enumerate(formats))
        )
        for i in range(6)
    )
    cost = {("f32", "a16"): 2.0, ("f32", "a8"): 3.0, ("a16", "a8"): 1.5}
    boundaries = tuple(
        Boundary(f"t{i}", (f,), f"t{i + 1}", (g,), latency_us=cost.get((f, g), cost.get((g, f), 0.0)))
        for i in range(5)
        for f, g in product(formats, formats)
        if f != g
    )
    problem = AllocationProblem(decisions, REFERENCE, boundaries=boundaries)
    for limit in (30, 34, 40, 45):
        budgets = [Budget("latency", limit)]
        assert allocate(problem, budgets).totals.loss == min(t.loss for _, t in plans(problem, budgets))


def test_wrong_calls_are_usage_errors() -> None:
    size = Budget.parse("size<=1KB")
    with pytest.raises(UsageError, match="two budgets for size"):
        allocate(two_layers(), [size, size])
    with pytest.raises(UsageError, match="objective"):
        allocate(two_layers(), [], ())
    with pytest.raises(UsageError, match="no memory timeline"):
        allocate(two_layers(), [Budget.parse("peak_memory<=1KB")])
    with pytest.raises(UsageError, match="costs -1"):
        two_layers(boundaries=(Boundary("a", ("w8",), "b", ("w8",), latency_us=-1.0),))
    with pytest.raises(UsageError, match="'c', which is not a decision"):
        two_layers(ties=(Tie(("a", "c")),))
    with pytest.raises(UsageError, match="'a' in 'w5'"):
        two_layers(requirements=(Requirement("a", ("w5",), "b", ("w8",)),))


FORMATS = ("f32", "w8", "w4", "w2")


@st.composite
def problems(draw: st.DrawFn) -> AllocationProblem:
    """Up to 8 decisions and 4,096 assignments, with a few rules of every kind. Costs are eighths: ties are exact."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8).filter(lambda c: math.prod(c) <= 600))
    eighths = st.integers(0, 80).map(lambda n: n / 8)
    decisions = tuple(
        Decision(
            f"d{i}",
            "layer",
            tuple(
                Option(
                    f, draw(eighths), draw(eighths) / 1e4, draw(st.integers(0, 9)), *(draw(eighths) for _ in range(3))
                )
                for f in draw(st.permutations(FORMATS))[:count]
            ),
        )
        for i, count in enumerate(counts)
    )

    def some(decision: Decision) -> tuple[str, ...]:
        return tuple(o.format for o in decision.options if draw(st.booleans()))

    def pick() -> Decision:
        return draw(st.sampled_from(decisions))

    def terms() -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple((d.name, some(d)) for d in (pick() for _ in range(draw(st.integers(0, 3)))))

    def times(most: int) -> range:
        return range(draw(st.integers(0, most)))

    pairs = [(a, b) for a in decisions for b in decisions if a is not b]
    boundaries = [
        (a, b, draw(st.integers(0, 5)), draw(eighths))
        for a, b in (draw(st.sampled_from(pairs)) for _ in times(6) if pairs)
    ]
    return AllocationProblem(
        decisions,
        REFERENCE,
        requirements=tuple(Requirement((a := pick()).name, some(a), (b := pick()).name, some(b)) for _ in times(2)),
        conjunctions=tuple(
            Conjunction((d := pick()).name, draw(st.sampled_from(d.options)).format, terms()) for _ in times(1)
        ),
        any_ofs=tuple(AnyOf((d := pick()).name, draw(st.sampled_from(d.options)).format, terms()) for _ in times(1)),
        boundaries=tuple(Boundary(a.name, some(a), b.name, some(b), size, us) for a, b, size, us in boundaries),
        ties=tuple(Tie((pick().name, pick().name)) for _ in times(1)),
        memory_steps=tuple(
            MemoryStep(
                f"n{i}",
                draw(st.integers(0, 9)),
                tuple((d.name, tuple((f, draw(st.integers(0, 30))) for f in some(d))) for d in decisions),
            )
            for i in times(3)
        ),
        fixed_size_bytes=draw(st.integers(0, 3)),
        fixed_latency_us=draw(eighths),
        fixed_bops=draw(eighths),
    )


@st.composite
def tasks(draw: st.DrawFn) -> tuple[AllocationProblem, list[Budget], tuple[Objective, ...]]:
    problem = draw(problems())
    dimensions: list[Dimension] = ["size", "latency", "bops", "bits", "error"]
    if problem.memory_steps:
        dimensions.append("peak_memory")
    legal = [totals for _, totals in plans(problem, [])]
    budgets = []
    for dimension in draw(st.lists(st.sampled_from(dimensions), unique=True, max_size=3)):
        percent = dimension == "error" and draw(st.booleans())
        # Limits lie on, just below and between the values of legal plans: the edges are where rounding would show.
        near = getattr(draw(st.sampled_from(legal)), problem.cap(Budget(dimension, 0))[0]) if legal else 1
        limit = max(near + draw(st.sampled_from([0, 0, -1, 3])), 0)
        budgets.append(Budget(dimension, limit, "percent") if percent else Budget(dimension, limit))
    objective = tuple(draw(st.lists(st.sampled_from(list(OBJECTIVE_COLUMNS)), unique=True, min_size=1, max_size=3)))
    return problem, budgets, objective


def plans(problem: AllocationProblem, budgets: list[Budget]) -> Iterator[tuple[dict[str, str], Totals]]:
    """Every legal assignment within the budgets, with its totals: the brute force."""
    caps = dict(problem.cap(budget) for budget in budgets)
    names = [decision.name for decision in problem.decisions]
    for formats in product(*([o.format for o in decision.options] for decision in problem.decisions)):
        assignment = dict(zip(names, formats, strict=True))
        if not problem.violations(assignment) and meets(totals := problem.evaluate(assignment), caps):
            yield assignment, totals


@given(tasks())
@settings(derandomize=True, deadline=None, max_examples=120)
def test_equals_brute_force(task: tuple[AllocationProblem, list[Budget], tuple[Objective, ...]]) -> None:
    problem, budgets, objective = task
    candidates = [totals for _, totals in plans(problem, budgets)]
    if not candidates:
        check_infeasible(problem, budgets)
        return
    found = allocate(problem, budgets, objective)
    assert not problem.violations(found.assignment)
    assert found.proved_optimal
    for name in objective:
        column = OBJECTIVE_COLUMNS[name]
        best = min(getattr(totals, column) for totals in candidates)
        assert getattr(found.totals, column) == pytest.approx(best, rel=1e-9, abs=0)
        candidates = [totals for totals in candidates if getattr(totals, column) <= best * (1 + 1e-9)]
    assert allocate(problem, budgets, objective).assignment == found.assignment


def check_infeasible(problem: AllocationProblem, budgets: list[Budget]) -> None:
    """The conflict is one, is minimal, and each reported least is the brute-force minimum beside the rest of it."""
    with pytest.raises(BudgetError) as caught:
        allocate(problem, budgets)
    error = caught.value
    if not isinstance(error, InfeasibleError):
        assert not list(plans(problem, []))
        return
    assert not list(plans(problem, list(error.conflict)))
    for entry, budget in zip(error.least, error.conflict, strict=True):
        rest = [other for other in error.conflict if other != budget]
        least = min(getattr(totals, entry.column) for _, totals in plans(problem, rest))
        assert entry.value == pytest.approx(least, rel=1e-9, abs=0)
        assert list(plans(problem, [*rest, entry.budget]))


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=20)
def test_a_problem_survives_json(problem: AllocationProblem) -> None:
    adapter = TypeAdapter(AllocationProblem)
    assert adapter.validate_json(adapter.dump_json(problem)) == problem


@pytest.mark.skipif(sys.platform == "win32", reason="C's buffer of standard output is out of reach there")
def test_what_the_solver_prints_stays_off_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS has a stray printf on one of its paths, and the command line writes JSON to that stream."""
    print("before")
    with milp._nothing_on_stdout():
        ctypes.CDLL(None).printf(b"stray, still in C's buffer")
        os.write(1, b"stray")
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_above_a_thousand_decisions_the_gap_is_reported() -> None:
    rng = np.random.default_rng(1)
    weights, sensitivity = rng.integers(100, 1000, 1001), rng.lognormal(0, 1, 1001)
    problem = AllocationProblem(
        tuple(
            layer(f"l{i}", *(Option(f"w{b}", float(s * 4.0**-b), 0, int(n) * b) for b in (8, 6, 4, 3, 2)))
            for i, (n, s) in enumerate(zip(weights, sensitivity, strict=True))
        ),
        REFERENCE,
    )
    found = allocate(problem, [Budget("size", float(weights.sum() * 4))])
    assert found.proved_optimal
    assert 0 <= found.gap <= 1e-4
    assert found.totals.size_bytes <= weights.sum() * 4
    assert "buys about −" in found.shadow_prices[0].text
