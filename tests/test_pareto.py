"""The frontier against brute force."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from lcpaq_onnx.allocation.allocate import allocate
from lcpaq_onnx.allocation.infeasible import InfeasibleError
from lcpaq_onnx.allocation.pareto import pareto
from lcpaq_onnx.allocation.problem import AllocationProblem, Decision, MemoryStep, Option, Reference
from lcpaq_onnx.budget import Budget, Dimension
from lcpaq_onnx.errors import UsageError

COLUMN = {"latency": "latency_us", "bops": "bops", "peak_memory": "peak_memory_bytes", "bits": "stored_bits"}


def network(layers: int, formats: tuple[int, ...] = (8, 6, 4, 2)) -> AllocationProblem:
    rng = np.random.default_rng(3)
    weights = rng.integers(100, 2000, layers)
    sensitivity = rng.lognormal(0, 1, layers)
    decisions = tuple(
        Decision(
            f"l{i}",
            "layer",
            tuple(
                Option(
                    f"w{b}",
                    float(sensitivity[i] * 4.0**-b),
                    0,
                    int(weights[i]) * b,
                    float(weights[i] * math.sqrt(b)),
                    b,
                    float(weights[i] * b / weights.sum()),
                )
                for b in formats
            ),
        )
        for i in range(layers)
    )
    step = MemoryStep("all", 0, tuple((d.name, tuple((o.format, o.size_bytes) for o in d.options)) for d in decisions))
    return AllocationProblem(decisions, Reference(10**6, 1e6, 1e6, 10**6), memory_steps=(step,))


def frontier(problem: AllocationProblem) -> set[tuple[int, float]]:
    """Every undominated (bytes, loss), by brute force."""
    names = [decision.name for decision in problem.decisions]
    found: set[tuple[int, float]] = set()
    every = product(*([o.format for o in decision.options] for decision in problem.decisions))
    totals = (problem.evaluate(dict(zip(names, formats, strict=True))) for formats in every)
    for size, loss in sorted((t.size_bytes, t.loss) for t in totals):
        if not found or loss < min(seen for _, seen in found):
            found.add((size, loss))
    return found


def test_every_point_is_on_the_frontier() -> None:
    problem = network(5)
    points = [(p.totals.size_bytes, p.totals.loss) for p in pareto(problem, "size", points=10)]
    exact = frontier(problem)
    assert set(points) <= exact
    assert points == sorted(points)
    assert points[0] == min(exact)
    assert points[-1] == max(exact)
    assert len(points) >= 8
    assert [loss for _, loss in points] == sorted((loss for _, loss in points), reverse=True)


def test_coarse_problems_give_few_points() -> None:
    assert len(pareto(network(1, (8, 4)), "size", points=12)) == 2
    assert len(pareto(network(1, (8,)), "size", points=12)) == 1


@pytest.mark.parametrize("dimension", ["latency", "bops", "peak_memory", "bits"])
def test_other_dimensions_rise_while_error_falls(dimension: Dimension) -> None:
    points = pareto(network(6), dimension, points=6)
    values = [getattr(p.totals, COLUMN[dimension]) for p in points]
    assert len(points) >= 4
    assert values == sorted(set(values))
    assert [p.totals.loss for p in points] == sorted((p.totals.loss for p in points), reverse=True)


def test_budgets_hold_at_every_point() -> None:
    problem = network(6)
    best = allocate(problem, [Budget.parse("latency<=0.012x"), Budget.parse("size<=30KB")])
    points = pareto(problem, "size", [Budget.parse("latency<=0.012x"), Budget.parse("size<=30KB")], points=6)
    assert all(p.totals.latency_us <= 12_000 and p.totals.size_bytes <= 30_000 for p in points)
    assert points[-1].totals.loss == best.totals.loss
    with pytest.raises(InfeasibleError):
        pareto(problem, "size", [Budget.parse("latency<=1us")])


def test_error_swept_for_latency() -> None:
    points = pareto(network(6), "error", points=5, objective="latency")
    assert [p.objective_value for p in points] == sorted((p.totals.latency_us for p in points), reverse=True)


def test_wrong_calls() -> None:
    with pytest.raises(UsageError, match="against itself"):
        pareto(network(2), "error")
    with pytest.raises(UsageError, match="1 points"):
        pareto(network(2), "size", points=1)
