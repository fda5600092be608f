"""An optimum carried over to a dearer problem is what solving there finds; it is refused where it may not be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lcpaq_onnx.allocation.allocate import Choice, allocate, choose, effort_for, priced
from lcpaq_onnx.allocation.carry import carried
from lcpaq_onnx.allocation.problem import AllocationProblem, AnyOf, Decision, Option, Reference, Tie
from lcpaq_onnx.allocation.programme import build_programme
from lcpaq_onnx.budget import Budget

NAMES = tuple(f"conv{i}" for i in range(6))


def problem(w2_bytes: int, *, unpacker_bytes: int | None = None) -> AllocationProblem:
    """Six layers in 8, 4 or 2 bits; with ``unpacker_bytes``, 2 bits need a shared unpacker."""
    layers = tuple(
        Decision(
            name,
            "layer",
            (
                Option("w8", loss=0.001, squared_error=0.001, size_bytes=800 + i, latency_us=1.0),
                Option("w4", loss=0.01 * (1 + i), squared_error=0.01, size_bytes=400 + i, latency_us=1.0),
                Option("w2", loss=0.5, squared_error=0.5, size_bytes=w2_bytes + i, latency_us=1.0),
            ),
        )
        for i, name in enumerate(NAMES)
    )
    reference = Reference(20_000, 10.0, 1.0, 1)
    if unpacker_bytes is None:
        return AllocationProblem(layers, reference)
    unpacker = Decision("storage", "storage", (Option("absent"), Option("present", size_bytes=unpacker_bytes)))
    rule = AnyOf("storage", "present", tuple((name, ("w2",)) for name in NAMES))
    return AllocationProblem((*layers, unpacker), reference, any_ofs=(rule,))


CHEAP = problem(200)
DEAR = problem(210, unpacker_bytes=100)


def chosen(cheap: AllocationProblem, budget: Budget) -> Choice:
    return choose(build_programme(cheap), (budget,), ("error",), effort_for(cheap, 60.0))


def carry(choice: Choice, dear: AllocationProblem, budget: Budget) -> Choice | None:
    return carried(choice, build_programme(dear), "loss", dict([dear.cap(budget)]))


@pytest.mark.parametrize("size_bytes", [5000, 4000, 3000, 2500])
def test_is_what_solving_finds(size_bytes: int) -> None:
    budget = Budget("size", size_bytes)
    found = carry(chosen(CHEAP, budget), DEAR, budget)
    assert found is not None
    solved = allocate(DEAR, (budget,))
    again = priced(found, (budget,), ("error",))
    assert replace(again, solver_seconds=0.0) == replace(solved, solver_seconds=0.0)
    assert again.assignment["storage"] == "absent"


def test_what_costs_more_there_is_solved_again() -> None:
    budget = Budget("size", 2300)
    choice = chosen(CHEAP, budget)
    assert "w2" in choice.allocation.assignment.values()
    assert carry(choice, DEAR, budget) is None


@pytest.mark.parametrize(
    "dear",
    [
        problem(190),
        replace(DEAR, ties=(Tie(NAMES[:2], "one weight"),)),
        replace(DEAR, reference=Reference(20_001, 10.0, 1.0, 1)),
        replace(CHEAP, decisions=CHEAP.decisions[:-1]),
    ],
    ids=["cheaper", "other-rules", "other-reference", "fewer-decisions"],
)
def test_another_problem_is_refused(dear: AllocationProblem) -> None:
    budget = Budget("size", 4000)
    assert carry(chosen(CHEAP, budget), dear, budget) is None
