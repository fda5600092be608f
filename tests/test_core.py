"""The core of a large programme: its answer against the exact one, what it proves, and when it gives up."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from lcpaq_onnx.allocation.allocate import Objective, allocate
from lcpaq_onnx.allocation.core import core_optimum
from lcpaq_onnx.allocation.optimum import Effort, minimise
from lcpaq_onnx.allocation.problem import (
    AllocationProblem,
    AnyOf,
    Boundary,
    Column,
    Decision,
    Option,
    Reference,
    Requirement,
)
from lcpaq_onnx.allocation.programme import build_programme
from lcpaq_onnx.budget import Budget

WIDTHS = (8, 6, 4, 3, 2)


def network(seed: int, layers: int = 80) -> AllocationProblem:
    """A chain of layers and activation groups: integer layers need integer groups, conversions cost time, and 3 bits
    need an unpacker.
    """
    rng = np.random.default_rng(seed)
    decisions: list[Decision] = []
    rules: list[Requirement] = []
    boundaries: list[Boundary] = []
    for i in range(layers):
        size, loss, float_us = int(rng.integers(300, 20_000)), float(rng.lognormal(-6, 1.5)), float(rng.uniform(5, 90))
        options = [Option("f32", 0, 0, 4 * size, float_us)]
        for kind, us in (("", float_us), ("a8", float_us * float(rng.uniform(0.3, 1.1)))):
            options += [Option(f"w{b}{kind}", loss * 4.0 ** (8 - b), 0, size * b // 8 + 40, us) for b in WIDTHS]
        decisions.append(Decision(f"l{i}", "layer", tuple(options)))
        decisions.append(Decision(f"g{i}", "activation", (Option("f32"), Option("a8", loss / 4, 0, 90, 0.5))))
        integer = tuple(f"w{b}a8" for b in WIDTHS)
        floats = ("f32", *(f"w{b}" for b in WIDTHS))
        rules.append(Requirement(f"l{i}", integer, f"g{i}", ("a8",)))
        boundaries.append(Boundary(f"l{i}", floats, f"g{i}", ("a8",), latency_us=float(rng.uniform(0.5, 4))))
        if i:
            rules.append(Requirement(f"l{i}", integer, f"g{i - 1}", ("a8",)))
            boundaries.append(Boundary(f"l{i}", floats, f"g{i - 1}", ("a8",), latency_us=float(rng.uniform(0.5, 4))))
    decisions.append(Decision("unpack", "storage", (Option("absent"), Option("present", size_bytes=1500))))
    unpack = AnyOf("unpack", "present", tuple((f"l{i}", ("w3", "w3a8")) for i in range(layers)))
    total = sum(d.options[0].size_bytes for d in decisions)
    reference = Reference(total, sum(d.options[0].latency_us for d in decisions), 1.0, 1)
    return AllocationProblem(
        tuple(decisions), reference, requirements=tuple(rules), any_ofs=(unpack,), boundaries=tuple(boundaries)
    )


def effort(relative_gap: float) -> Effort:
    return Effort(relative_gap, time.perf_counter() + 60)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("goals", [("loss",), ("latency_us", "loss")])
def test_is_as_good_as_the_exact_answer_within_what_it_proves(seed: int, goals: tuple[Column, ...]) -> None:
    problem = network(seed)
    programme = build_programme(problem)
    caps = dict([problem.cap(Budget.parse("size<=0.15x"))])
    if goals[0] != "loss":
        least = minimise(programme, "loss", caps, effort(1e-4))
        assert least is not None
        caps["loss"] = 1.3 * least.value
    found = core_optimum(programme, goals, caps, effort(1e-4))
    exact = minimise(programme, goals[0], caps, effort(1e-6))
    assert found is not None
    assert exact is not None
    assert not problem.violations(found.assignment)
    assert found.totals == problem.evaluate(found.assignment)
    assert found.totals.size_bytes <= caps["size_bytes"]
    assert found.bound <= exact.value * (1 + 1e-6) <= found.value * (1 + 2e-6)
    assert found.value <= 1.03 * found.bound
    assert found.value <= 1.005 * exact.value  # in practice; promised are 3 %


def test_later_goals_decide_between_equals() -> None:
    problem = network(2)
    free = Decision("free", "operator", (Option("slow", latency_us=9.0), Option("fast", latency_us=1.0)))
    changed = replace(problem, decisions=(*problem.decisions, free))
    found = allocate(changed, [Budget.parse("size<=0.2x")], ("error", "latency"))
    assert found.assignment["free"] == "fast"
    assert 0 <= found.gap <= 0.03


def test_nothing_to_minimise_and_no_room_are_left_to_the_whole_programme() -> None:
    problem = network(3)
    programme = build_programme(problem)
    assert core_optimum(programme, ("loss",), {}, effort(1e-4)) is None  # all float: no loss at all
    assert core_optimum(programme, ("loss",), {"size_bytes": 10.0}, effort(1e-4)) is None
    objective: tuple[Objective, ...] = ("error",)
    assert allocate(problem, (), objective).totals.loss == 0


def test_says_the_same_twice() -> None:
    problem = network(4)
    budgets = [Budget.parse("size<=0.12x")]
    first, second = (allocate(problem, budgets, ("error", "latency")) for _ in range(2))
    assert first.assignment == second.assignment
    assert first.shadow_prices == second.shadow_prices
    assert "buys about −" in first.shadow_prices[0].text
