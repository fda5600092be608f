"""A local exchange over the programme's answer: other widths of one or two layers, where errors cancel or add up.

The programme sums losses decision by decision. ``Interactions`` also know what two decisions do together, which makes
the loss a quadratic form; steepest descent lowers it within the same rules and caps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from lcpaq_onnx.allocation.neighbourhood import Neighbourhood, entry_of, followed, neighbourhood_of
from lcpaq_onnx.allocation.optimum import LIMIT_SLACK, Caps, meets
from lcpaq_onnx.allocation.problem import AllocationProblem, Column
from lcpaq_onnx.errors import UsageError
from lcpaq_onnx.numeric.interactions import Interactions

__all__ = ["Exchanged", "exchange", "predicted_loss"]

LEAST_GAIN = 1e-6
"""A step lowers the predicted loss by more than this part of it."""
_STEPS = 1000
# Nearly always the first passes: only rules between layers and peak memory can still refuse a candidate.
_CONFIRMED = 500


@dataclass(frozen=True)
class Exchanged:
    """The plan after the exchange, its predicted loss before and after, and the ``moves`` in their order.

    A move is a text such as ``conv3: w4a8 -> w5a8``; the two of a pair follow each other.
    """

    assignment: dict[str, str]
    loss_before: float
    loss_after: float
    moves: tuple[str, ...]


def exchange(
    problem: AllocationProblem, assignment: Mapping[str, str], interactions: Interactions, caps: Caps
) -> Exchanged:
    """Lower the predicted loss of ``assignment`` by changing the stored width of one or two layers at a time.

    The result keeps every rule and cap, its predicted loss is never larger, and no single or paired change of layers
    that keep their activation format would lower it by more than ``LEAST_GAIN`` (unless 1,000 steps were not enough, or
    500 better ones in a row broke a rule between layers). Caps on ``loss`` and ``squared_error`` hold by the table's
    sums; an objective that was minimised before is kept by capping its column. Tied layers do not move. Deterministic.

    Raises UsageError when ``assignment`` itself breaks a rule or a cap, or names a layer's format that is none.
    """
    broken = problem.violations(assignment)
    if broken or not meets(problem.evaluate(assignment), caps):
        what = broken[0] if broken else "it is beyond a cap"
        raise UsageError(f"the plan to improve is not legal: {what}", hint="start from the answer of allocate")
    around = neighbourhood_of(problem, assignment, interactions, caps)
    plan = {decision.name: assignment[decision.name] for decision in problem.decisions}
    before = loss = predicted_loss(problem, plan, interactions)
    moves: list[str] = []
    for _ in range(_STEPS):
        step = _best_step(problem, plan, interactions, caps, around, loss)
        if step is None:
            break
        moves += [f"{name}: {plan[name]} -> {step.plan[name]}" for name in step.layers]
        plan, loss = step.plan, step.loss
    return Exchanged(plan, before, loss, tuple(moves))


def predicted_loss(problem: AllocationProblem, assignment: Mapping[str, str], interactions: Interactions) -> float:
    """Loss of the whole plan with cross terms; decisions without an embedding add their own loss of the table."""
    entries = [(d.name, entry_of(d, assignment[d.name])) for d in problem.decisions]
    known = [entry for _, entry in entries if entry in interactions.row_of]
    alone = [problem.option_of[n, assignment[n]].loss for n, entry in entries if entry not in interactions.row_of]
    return interactions.loss_of(known) + sum(alone)


@dataclass(frozen=True)
class _Step:
    plan: dict[str, str]
    loss: float
    layers: tuple[str, ...]


def _best_step(
    problem: AllocationProblem,
    plan: Mapping[str, str],
    interactions: Interactions,
    caps: Caps,
    around: Neighbourhood,
    loss: float,
) -> _Step | None:
    """The change with the largest gain that exact arithmetic confirms; None when there is none."""
    totals = problem.evaluate(plan)
    room: dict[Column, float] = {
        # The sums of the filter round differently: what it lets through by that is refused below.
        column: cap + 2 * LIMIT_SLACK * abs(cap) - float(getattr(totals, column))
        for column, cap in caps.items()
    }
    for changes in islice(around.improving(plan, LEAST_GAIN * loss, room), _CONFIRMED):
        changed = followed(problem, {**plan, **dict(changes)})
        found = predicted_loss(problem, changed, interactions)
        lower = found < loss * (1 - LEAST_GAIN)
        if lower and meets(problem.evaluate(changed), caps) and not problem.violations(changed):
            return _Step(changed, found, tuple(name for name, _ in changes))
    return None
