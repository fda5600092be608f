"""The exchange against hand arithmetic and, on random problems, against every single and paired change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import planning_case
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcpaq_onnx.allocation.allocate import allocate
from lcpaq_onnx.allocation.exchange import LEAST_GAIN, Exchanged, exchange, predicted_loss
from lcpaq_onnx.allocation.neighbourhood import entry_of
from lcpaq_onnx.allocation.optimum import Caps, meets
from lcpaq_onnx.allocation.problem import (
    AllocationProblem,
    AnyOf,
    Boundary,
    Decision,
    MemoryStep,
    Option,
    Reference,
    Requirement,
    Tie,
)
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.numeric.interactions import Entry, Interactions, interactions_of

REFERENCE = Reference(size_bytes=1000, latency_us=1000.0, bops=1e6, peak_memory_bytes=1000)


def layers(losses: Mapping[str, Mapping[str, float]], **rules: tuple[object, ...]) -> AllocationProblem:
    """Layers of 80 weights; each byte of theirs counts."""
    decisions = tuple(
        Decision(
            name,
            "layer",
            tuple(Option(f, loss, loss / 10, 10 * (LayerFormat.parse(f).weight_bits or 32)) for f, loss in by.items()),
        )
        for name, by in losses.items()
    )
    return AllocationProblem(decisions, REFERENCE, **rules)  # type: ignore[arg-type] # the tests' shorthand


def table_losses(problem: AllocationProblem) -> dict[Entry, float]:
    """The table's loss by entry."""
    return {
        entry: option.loss
        for decision in problem.decisions
        for option in decision.options
        if (entry := entry_of(decision, option.format)) is not None
    }


def with_losses(known: Interactions, table: Mapping[Entry, float]) -> Interactions:
    """The same cosines, with the table's losses of single entries."""
    wanted = np.array([table[entry] for entry in known.entries])
    factor = np.sqrt(wanted / np.diagonal(known.gram))
    gram = known.gram * np.outer(factor, factor)
    np.fill_diagonal(gram, wanted)
    return Interactions(known.entries, gram)


def interactions(problem: AllocationProblem, correlations: Mapping[tuple[Entry, Entry], float]) -> Interactions:
    """The table's losses, with the given cosines between output changes."""
    table = table_losses(problem)
    gram = np.eye(len(table))
    row_of = {entry: row for row, entry in enumerate(table)}
    for (first, second), cosine in correlations.items():
        gram[row_of[first], row_of[second]] = gram[row_of[second], row_of[first]] = cosine
    return with_losses(Interactions(tuple(table), gram), table)


def improved(problem: AllocationProblem, known: Interactions, *texts: str) -> Exchanged:
    budgets = [Budget.parse(text) for text in texts]
    start = allocate(problem, budgets).assignment
    caps = dict(problem.cap(budget) for budget in budgets)
    return checked(problem, start, known, caps)


def checked(problem: AllocationProblem, start: Mapping[str, str], known: Interactions, caps: Caps) -> Exchanged:
    found = exchange(problem, start, known, caps)
    assert not problem.violations(found.assignment)
    assert meets(problem.evaluate(found.assignment), caps)
    assert found.loss_before == predicted_loss(problem, start, known)
    assert found.loss_after == predicted_loss(problem, found.assignment, known)
    assert found.loss_after <= found.loss_before
    assert bool(found.moves) == (found.assignment != start)
    assert list(found.assignment) == [decision.name for decision in problem.decisions]
    assert exchange(problem, start, known, caps) == found
    return found


THREE = {name: {"w8a8": 0.0, "w4a8": loss} for name, loss in (("a", 1.0), ("b", 1.1), ("c", 1.5))}


def test_errors_that_add_up_are_kept_apart() -> None:
    # Two of three at 4 bits. Table: a + b = 2.1. Together (1 + √1.1)² ≈ 4.2, while a + c = 2.5 and b + c = 2.6.
    problem = layers(THREE)
    known = interactions(problem, {(("a", "w4"), ("b", "w4")): 1.0})
    found = improved(problem, known, "size<=160B")
    assert found.assignment == {"a": "w4a8", "b": "w8a8", "c": "w4a8"}
    assert found.moves == ("b: w4a8 -> w8a8", "c: w8a8 -> w4a8")
    assert found.loss_before == pytest.approx((1 + 1.1**0.5) ** 2)
    assert found.loss_after == pytest.approx(2.5)


def test_errors_that_cancel_are_brought_together() -> None:
    # b against c: (√1.5 - √1.1)² ≈ 0.03 instead of a + b = 2.1.
    problem = layers(THREE)
    known = interactions(problem, {(("b", "w4"), ("c", "w4")): -1.0})
    found = improved(problem, known, "size<=160B")
    assert found.assignment == {"a": "w8a8", "b": "w4a8", "c": "w4a8"}
    assert found.loss_after == pytest.approx((1.5**0.5 - 1.1**0.5) ** 2)


def test_a_layer_is_narrowed_where_that_cancels_an_error() -> None:
    # Without a budget the table leaves all at 8 bits; c cannot move, and a cancels its error.
    problem = layers({"a": {"w8a8": 0.0, "w4a8": 1.0}, "c": {"w2a8": 1.0}})
    found = improved(problem, interactions(problem, {(("a", "w4"), ("c", "w2")): -0.8}))
    assert found.moves == ("a: w8a8 -> w4a8",)
    assert found.loss_after == pytest.approx(2 - 2 * 0.8)


def test_activation_groups_stay_and_count() -> None:
    group = Decision("activation x", "activation", (Option("f32", 9.0), Option("a8", 1.0)))
    own = layers({"a": {"w8a8": 0.0, "w4a8": 0.5, "w4": 0.5, "f32": 0.0}}).decisions
    rule = Requirement("a", ("w8a8", "w4a8"), "activation x", ("a8",))
    problem = AllocationProblem((*own, group), REFERENCE, requirements=(rule,))
    known = interactions(problem, {(("activation x", "a8"), ("a", "w4")): -0.9})
    found = checked(problem, {"a": "w8a8", "activation x": "a8"}, known, {})
    assert found.assignment == {"a": "w4a8", "activation x": "a8"}
    assert found.loss_after == pytest.approx(1 + 0.5 - 2 * 0.9 * 0.5**0.5)


def test_what_has_no_embedding_counts_by_the_table() -> None:
    problem = layers(THREE)
    everything = interactions(problem, {(("a", "w4"), ("b", "w4")): 1.0})
    without_c = Interactions(everything.entries[:4], everything.gram[:4, :4])
    assert improved(problem, without_c, "size<=160B") == improved(problem, everything, "size<=160B")
    nothing = interactions_of({})
    assert improved(problem, nothing, "size<=160B").moves == ()


def test_layers_that_share_a_weight_do_not_move() -> None:
    problem = layers(THREE, ties=(Tie(("a", "c"), "one weight"),))
    known = interactions(problem, {(("a", "w4"), ("c", "w4")): 1.0})
    # a and c at 4 bits lose (1 + √1.5)² together; b can take the place of one of them only.
    start = {"a": "w4a8", "b": "w8a8", "c": "w4a8"}
    assert checked(problem, start, known, {"size_bytes": 160}).moves == ()


@pytest.mark.parametrize(("limit", "moved"), [(240, True), (239, False)])
def test_a_budget_may_be_met_to_the_byte(limit: int, moved: bool) -> None:
    problem = layers(THREE)
    start = {"a": "w4a8", "b": "w4a8", "c": "w8a8"}
    grown = {"a": "w8a8", "b": "w8a8", "c": "w8a8"}
    found = checked(problem, start, interactions(problem, {}), {"size_bytes": limit})
    assert (found.assignment == grown) == moved


def test_error_budgets_hold_by_the_table() -> None:
    problem = layers(THREE)
    known = interactions(problem, {(("b", "w4"), ("c", "w4")): -1.0})
    start = {"a": "w4a8", "b": "w4a8", "c": "w8a8"}
    # b + c lose 2.6 by the table and 0.26 in squared error.
    assert checked(problem, start, known, {"size_bytes": 160, "loss": 2.6}).moves
    assert not checked(problem, start, known, {"size_bytes": 160, "loss": 2.59}).moves
    assert checked(problem, start, known, {"size_bytes": 160, "squared_error": 0.26}).moves
    assert not checked(problem, start, known, {"size_bytes": 160, "squared_error": 0.259}).moves


def with_storage(size_bytes: int) -> AllocationProblem:
    decisions = layers({n: {"w8a8": 0.0, "w6a8": 1.0, "w4a8": 2.0} for n in "ab"}).decisions
    storage = Decision("storage int6", "storage", (Option("absent"), Option("present", size_bytes=size_bytes)))
    rule = AnyOf("storage int6", "present", (("a", ("w6a8",)), ("b", ("w6a8",))))
    return AllocationProblem((*decisions, storage), REFERENCE, any_ofs=(rule,))


def test_storage_follows_the_layers() -> None:
    problem = with_storage(5)
    start = {"a": "w4a8", "b": "w4a8", "storage int6": "absent"}
    known = interactions(problem, {})
    # 40 + 40 bytes; one layer at 6 bits is 105, both 125: the second is nearer than its own 20 bytes and the storage.
    assert checked(problem, start, known, {"size_bytes": 104}).moves == ()
    assert checked(problem, start, known, {"size_bytes": 105}).assignment["storage int6"] == "present"
    assert checked(problem, start, known, {"size_bytes": 125}).loss_after == 2.0
    # 60 + 40 + 30 bytes; the 20 more of a at 8 bits come from storage that nothing uses then.
    problem = with_storage(30)
    start = {"a": "w6a8", "b": "w4a8", "storage int6": "present"}
    found = checked(problem, start, known, {"size_bytes": 130})
    assert found.assignment == {"a": "w8a8", "b": "w4a8", "storage int6": "absent"}


def test_rules_that_only_exact_arithmetic_sees() -> None:
    # Better plans exist, but a rule between two layers, or memory that one of them holds, forbids them.
    start = {"a": "w4a8", "b": "w4a8", "c": "w8a8"}
    rule = Requirement("c", ("w4a8",), "a", ("w4a8",))
    problem = layers(THREE, requirements=(rule,))
    known = interactions(problem, {(("a", "w4"), ("b", "w4")): 1.0, (("a", "w4"), ("c", "w4")): 1.0})
    assert checked(problem, start, known, {"size_bytes": 160}).moves == ()
    step = MemoryStep("n", 10, (("c", (("w4a8", 90),)),))
    problem = layers(THREE, memory_steps=(step,))
    assert checked(problem, start, known, {"size_bytes": 160, "peak_memory_bytes": 100}).moves
    assert not checked(problem, start, known, {"size_bytes": 160, "peak_memory_bytes": 99}).moves


def test_a_plan_that_is_not_legal_is_refused() -> None:
    problem = layers(THREE)
    widest = dict.fromkeys("abc", "w8a8")
    with pytest.raises(UsageError, match="beyond a cap"):
        exchange(problem, widest, interactions_of({}), {"size_bytes": 239})
    tied = layers(THREE, ties=(Tie(("a", "b")),))
    with pytest.raises(UsageError, match="must share one format"):
        exchange(tied, widest | {"a": "w4a8"}, interactions_of({}), {})


def test_no_layer_may_move() -> None:
    problem = layers({"a": {"w8a8": 1.0}, "b": {"f32": 0.0, "w8": 1.0}})
    assert checked(problem, {"a": "w8a8", "b": "f32"}, interactions(problem, {}), {"size_bytes": 1000}).moves == ()


FORMATS = ("w8a8", "w5a8", "w3a8")


@dataclass(frozen=True)
class Case:
    """``start``: a legal plan within ``caps``."""

    problem: AllocationProblem
    interactions: Interactions
    caps: Caps
    start: dict[str, str]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Four layers of three widths: random sizes, storage, conversions and sometimes a tie; a positive Gram matrix."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = [f"l{i}" for i in range(4)]
    shared = rng.standard_normal((6, 4))
    embeddings = {
        (name, f.removesuffix("a8")): ((rng.standard_normal((6, 4)) + 2 * rng.normal() * shared) * scale).astype(
            np.float32
        )
        for name in names
        for f, scale in zip(FORMATS, (0.02, 0.2, 1.0), strict=True)
    }
    known = interactions_of(embeddings)
    decisions = [
        Decision(
            name,
            "layer",
            tuple(
                Option(f, known.loss_of([(name, f.removesuffix("a8"))]), 0.0, int(f[1]) * n, float(rng.integers(1, 9)))
                for f in FORMATS
            ),
        )
        for name, n in zip(names, rng.integers(1, 12, 4).tolist(), strict=True)
    ]
    storage = Decision(
        "storage int5", "storage", (Option("absent"), Option("present", size_bytes=int(rng.integers(9))))
    )
    group = Decision("activation x", "activation", (Option("f32"), Option("a8", 0.1)))
    ends = rng.choice([*names, group.name], (2, 2), replace=False)
    some = {name: FORMATS[: rng.integers(1, 3)] for name in names} | {group.name: ("a8",)}
    problem = AllocationProblem(
        (*decisions, group, storage),
        REFERENCE,
        requirements=(Requirement("l0", FORMATS, group.name, ("a8",)), Requirement("l1", ("w8a8",), "l0", FORMATS[:2])),
        any_ofs=(AnyOf("storage int5", "present", tuple((name, ("w5a8",)) for name in names)),),
        boundaries=tuple(Boundary(str(a), some[a], str(b), some[b], 3, 2.0) for a, b in ends),
        ties=(Tie(("l2", "l3")),) if draw(st.booleans()) else (),
    )
    plans = [plan for plan in every_plan(problem) if not problem.violations(plan)]
    start = plans[int(rng.integers(len(plans)))]
    totals = problem.evaluate(start)
    return Case(problem, known, {"size_bytes": totals.size_bytes, "latency_us": totals.latency_us}, start)


def every_plan(problem: AllocationProblem) -> Iterator[dict[str, str]]:
    names = [decision.name for decision in problem.decisions]
    for formats in product(*([option.format for option in decision.options] for decision in problem.decisions)):
        yield dict(zip(names, formats, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_no_single_or_paired_change_is_better(case: Case) -> None:
    problem, known = case.problem, case.interactions
    found = checked(problem, case.start, known, case.caps)
    tied = {name for tie in problem.ties for name in tie.decisions}
    for plan in every_plan(problem):
        changed = {name for name in plan if plan[name] != found.assignment[name]} - {"storage int5"}
        if len(changed) > 2 or changed & {"activation x", *tied}:
            continue
        if predicted_loss(problem, plan, known) < found.loss_after * (1 - 2 * LEAST_GAIN):
            assert problem.violations(plan) or not meets(problem.evaluate(plan), case.caps)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases())
def test_without_cross_terms_the_programme_is_right(case: Case) -> None:
    alone = Interactions(case.interactions.entries, np.diag(np.diagonal(case.interactions.gram)))
    budgets = [Budget("size", case.caps["size_bytes"]), Budget("latency", case.caps["latency_us"])]
    allocation = allocate(case.problem, budgets)
    caps = dict(case.problem.cap(budget) for budget in budgets)
    found = checked(case.problem, allocation.assignment, alone, caps)
    assert found.moves == ()
    assert found.loss_after == pytest.approx(allocation.totals.loss, rel=1e-9)


def test_a_formulated_problem() -> None:
    """The rules of a real network: storage, boundaries and activation groups as the planner makes them."""
    problem = planning_case.formulation().problem()
    table = table_losses(problem)
    rng = np.random.default_rng(5)
    shared = rng.standard_normal((16, 8))
    embeddings = {entry: (rng.standard_normal((16, 8)) + shared * rng.normal()).astype(np.float32) for entry in table}
    known = with_losses(interactions_of(embeddings), table)
    budget = Budget.parse("size<=0.13x")
    start = allocate(problem, [budget]).assignment
    found = checked(problem, start, known, dict([problem.cap(budget)]))
    assert found.moves
    assert found.loss_after < found.loss_before
