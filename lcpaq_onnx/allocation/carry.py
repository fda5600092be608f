"""An optimum of one problem that is surely one of another, dearer problem too, so that nothing is solved twice."""

from __future__ import annotations

from dataclasses import fields, replace

from lcpaq_onnx.allocation.allocate import Choice
from lcpaq_onnx.allocation.optimum import Caps, relaxation
from lcpaq_onnx.allocation.problem import AllocationProblem, Column, Option
from lcpaq_onnx.allocation.programme import Programme

__all__ = ["carried"]

_COSTS = tuple(f.name for f in fields(Option) if f.name != "format")
_FIXED = ("fixed_size_bytes", "fixed_latency_us", "fixed_bops")
_SHARED_RULES = ("reference", "requirements", "conjunctions", "boundaries", "ties", "memory_steps")


def carried(choice: Choice, programme: Programme, goal: Column, caps: Caps) -> Choice | None:
    """``choice`` as the answer to the dearer ``programme``; None where that is not certain.

    Nothing is cheaper there, and every rule holds there too: what is best where more can be had for less, and costs the
    same here, is best here. ``goal`` and ``caps`` are those that ``choice`` was made for.
    """
    cheap, dear = choice.programme.problem, programme.problem
    if not _is_dearer(dear, cheap):
        return None
    assignment = _with_storage(dear, choice.allocation.assignment)
    totals = choice.allocation.totals
    if assignment is None or dear.evaluate(assignment) != totals or dear.violations(assignment):
        return None
    allocation = replace(choice.allocation, assignment=assignment)
    if choice.effort.relative_gap > 0:
        return replace(
            choice, allocation=allocation
        )  # prices are rough there, and those of the cheaper problem as good
    relaxed = relaxation(programme, goal, caps, choice.effort)
    first = replace(choice.first, assignment=assignment, totals=totals, relaxed=relaxed)
    return replace(choice, programme=programme, allocation=allocation, first=first)


def _is_dearer(dear: AllocationProblem, cheap: AllocationProblem) -> bool:
    """Whether all that ``dear`` offers is on offer in ``cheap``, under no more rules and for no more."""
    if any(getattr(dear, name) != getattr(cheap, name) for name in _SHARED_RULES):
        return False
    if any(getattr(dear, name) < getattr(cheap, name) for name in _FIXED):
        return False
    if not set(cheap.any_ofs) <= set(dear.any_ofs) or not cheap.decision_of.keys() <= dear.decision_of.keys():
        return False
    return all(
        all(getattr(option, cost) >= getattr(cheap.option_of[key], cost) for cost in _COSTS)
        if key in cheap.option_of
        else key[0] not in cheap.decision_of
        for key, option in dear.option_of.items()
    )


def _with_storage(problem: AllocationProblem, assignment: dict[str, str]) -> dict[str, str] | None:
    """``assignment`` with the decisions that only ``problem`` has and that its rules settle."""
    settled = dict(assignment)
    for rule in problem.any_ofs:
        others = [
            option.format for option in problem.decision_of[rule.decision].options if option.format != rule.format
        ]
        if len(others) != 1:
            return None
        is_needed = any(assignment[name] in formats for name, formats in rule.terms)
        settled[rule.decision] = rule.format if is_needed else others[0]
    missing = problem.decision_of.keys() - settled.keys()
    return None if missing else {name: settled[name] for name in problem.decision_of}
