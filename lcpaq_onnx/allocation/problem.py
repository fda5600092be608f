"""The allocation problem as plain values: what may be chosen, what each choice costs, which choices go together.

``AllocationProblem.evaluate`` and ``violations`` are the meaning of every field; the integer linear programme
(``programme.py``) is a translation of it and is tested against it. All values are JSON-able.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

from lcpaq_onnx.allocation.rules import (
    AnyOf,
    Boundary,
    Conjunction,
    MemoryStep,
    Requirement,
    Terms,
    Tie,
    live_bytes,
)
from lcpaq_onnx.budget import Budget, Dimension
from lcpaq_onnx.errors import UsageError

__all__ = [
    "AllocationProblem",
    "AnyOf",
    "Boundary",
    "Column",
    "Conjunction",
    "Decision",
    "MemoryStep",
    "Option",
    "Reference",
    "Requirement",
    "Terms",
    "Tie",
    "Totals",
    "live_bytes",
]

Column = Literal["loss", "squared_error", "size_bytes", "latency_us", "bops", "stored_bits", "peak_memory_bytes"]
_CAPPED: dict[Dimension, Column] = {
    "size": "size_bytes",
    "latency": "latency_us",
    "bops": "bops",
    "peak_memory": "peak_memory_bytes",
    "bits": "stored_bits",
}


@dataclass(frozen=True)
class Option:
    """One format a decision may take, and what it adds to the totals (all >= 0).

    ``loss`` is the predicted contribution to the teacher loss; ``squared_error`` the contribution to the square of the
    output's root mean square error over its scale. Both add up over decisions. ``stored_bits``: width times the part of
    all weights that this decision is about, so that the sum is the mean width.
    """

    format: str
    loss: float = 0.0
    squared_error: float = 0.0
    size_bytes: int = 0
    latency_us: float = 0.0
    bops: float = 0.0
    stored_bits: float = 0.0


@dataclass(frozen=True)
class Decision:
    """Something that takes exactly one of ``options``; their order is the order of preference between equal plans."""

    name: str
    kind: Literal["layer", "activation", "operator", "storage"]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Reference:
    """Totals of the FP32 model: what ``1.0x`` of a budget means."""

    size_bytes: int
    latency_us: float
    bops: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Totals:
    """What an assignment costs. ``relative_error`` is the square root of ``squared_error`` (1 % = 0.01);
    ``stored_bits`` the mean over all weights.
    """

    loss: float
    squared_error: float
    relative_error: float
    size_bytes: int
    latency_us: float
    bops: float
    stored_bits: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class AllocationProblem:
    """Raises UsageError when a name is unknown or double, a cost negative or not finite, a decision without options."""

    decisions: tuple[Decision, ...]
    reference: Reference
    requirements: tuple[Requirement, ...] = ()
    conjunctions: tuple[Conjunction, ...] = ()
    any_ofs: tuple[AnyOf, ...] = ()
    boundaries: tuple[Boundary, ...] = ()
    ties: tuple[Tie, ...] = ()
    memory_steps: tuple[MemoryStep, ...] = ()
    fixed_size_bytes: int = 0
    fixed_latency_us: float = 0.0
    fixed_bops: float = 0.0

    def __post_init__(self) -> None:
        if len({decision.name for decision in self.decisions}) < len(self.decisions):
            raise UsageError("two decisions have the same name", hint="name decisions after their node or tensor")
        for decision in self.decisions:
            if not decision.options:
                raise UsageError(f"decision '{decision.name}' has no option", hint="give it at least its float format")
            if len({option.format for option in decision.options}) < len(decision.options):
                raise UsageError(f"decision '{decision.name}' offers a format twice", hint="keep the cheaper one")
        for where, formats in self._mentions():
            if where not in self.decision_of:
                raise UsageError(
                    f"a rule of the allocation names '{where}', which is not a decision", hint="drop the rule"
                )
            for format_ in formats:
                if (where, format_) not in self.option_of:
                    message = f"a rule of the allocation names '{where}' in '{format_}', a format it does not have"
                    raise UsageError(message, hint="keep only the decision's own formats in a rule")
        for boundary in self.boundaries:
            if boundary.first == boundary.second:
                raise UsageError(f"'{boundary.first}' has a boundary with itself", hint="add the cost to its options")
        for what, cost in self._costs():
            if not (math.isfinite(cost) and cost >= 0):
                raise UsageError(f"{what} costs {cost}", hint="costs and losses are finite and not negative")

    @cached_property
    def decision_of(self) -> dict[str, Decision]:
        """Decision by name."""
        return {decision.name: decision for decision in self.decisions}

    @cached_property
    def option_of(self) -> dict[tuple[str, str], Option]:
        """Option by decision and format."""
        return {(d.name, option.format): option for d in self.decisions for option in d.options}

    def evaluate(self, assignment: Mapping[str, str]) -> Totals:
        """Totals of ``assignment`` (decision → format), whether or not it keeps the rules.

        Raises UsageError when a decision is missing or takes a format it does not have.
        """
        chosen = [self._chosen(decision.name, assignment) for decision in self.decisions]
        paid = [
            b
            for b in self.boundaries
            if assignment[b.first] in b.first_formats and assignment[b.second] in b.second_formats
        ]
        squared_error = math.fsum(option.squared_error for option in chosen)
        latency_us = [o.latency_us for o in chosen] + [b.latency_us for b in paid] + [self.fixed_latency_us]
        return Totals(
            loss=math.fsum(option.loss for option in chosen),
            squared_error=squared_error,
            relative_error=math.sqrt(squared_error),
            size_bytes=self.fixed_size_bytes + sum(o.size_bytes for o in chosen) + sum(b.size_bytes for b in paid),
            latency_us=math.fsum(latency_us),
            bops=math.fsum([self.fixed_bops, *(option.bops for option in chosen)]),
            stored_bits=math.fsum(option.stored_bits for option in chosen),
            peak_memory_bytes=max((live_bytes(step, assignment) for step in self.memory_steps), default=0),
        )

    def violations(self, assignment: Mapping[str, str]) -> tuple[str, ...]:
        """One text per rule that ``assignment`` breaks; empty for a legal one. Budgets are not rules."""

        def holds(term: tuple[str, tuple[str, ...]]) -> bool:
            return assignment[term[0]] in term[1]

        broken = [
            f"{r.decision} in {assignment[r.decision]} needs {r.needs} in {' or '.join(r.needed_formats) or 'nothing'}"
            for r in self.requirements
            if assignment[r.decision] in r.formats and assignment[r.needs] not in r.needed_formats
        ]
        broken += [
            f"{c.decision} is {c.format} exactly when all of its terms hold"
            for c in self.conjunctions
            if (assignment[c.decision] == c.format) != all(map(holds, c.terms))
        ]
        broken += [
            f"{a.decision} is {a.format} exactly when one of its terms holds"
            for a in self.any_ofs
            if (assignment[a.decision] == a.format) != any(map(holds, a.terms))
        ]
        broken += [
            f"{', '.join(tie.decisions)} must share one format ({tie.reason})"
            for tie in self.ties
            if len({assignment[name] for name in tie.decisions}) > 1
        ]
        return tuple(broken)

    def cap(self, budget: Budget) -> tuple[Column, float]:
        """The column that ``budget`` limits and its largest allowed value, in the column's unit.

        Bytes are rounded down to whole ones; ``error<=p%`` caps ``squared_error`` at (p/100)². Raises UsageError when
        the FP32 reference needed is 0 or the problem has no memory steps.
        """
        if budget.dimension == "peak_memory" and not self.memory_steps:
            raise UsageError(f"{budget}: this problem has no memory timeline", hint="drop the peak_memory budget")
        if budget.dimension == "error":
            return ("squared_error", (budget.limit / 100) ** 2) if budget.unit == "percent" else ("loss", budget.limit)
        # Exact decimals: 0.29 x 100 bytes are 29 bytes, where floating point makes 28.999….
        limit = Fraction(repr(float(budget.limit)))
        if budget.unit == "relative":
            whole = self.reference_of(budget.dimension)
            if not whole > 0:
                raise UsageError(
                    f"{budget}: the FP32 model has no {budget.dimension} to compare with", hint="use a unit"
                )
            limit *= Fraction(whole)
        column = _CAPPED[budget.dimension]
        return column, math.floor(limit) if column.endswith("bytes") else float(limit)

    def reference_of(self, dimension: Dimension) -> float:
        """What 1.0x of ``dimension`` is, in its column's unit; not of error and bits, which are never relative."""
        return float(getattr(self.reference, _CAPPED[dimension]))

    def _chosen(self, name: str, assignment: Mapping[str, str]) -> Option:
        option = self.option_of.get((name, assignment.get(name, "")))
        if option is None:
            have = ", ".join(o.format for o in self.decision_of[name].options)
            raise UsageError(f"'{name}' cannot take the format '{assignment.get(name)}'", hint=f"it has {have}")
        return option

    def _mentions(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every (decision, formats) that a rule or cost names."""
        for r in self.requirements:
            yield from ((r.decision, r.formats), (r.needs, r.needed_formats))
        for c in self.conjunctions:
            yield from ((c.decision, (c.format,)), *c.terms)
        for a in self.any_ofs:
            yield from ((a.decision, (a.format,)), *a.terms)
        for b in self.boundaries:
            yield from ((b.first, b.first_formats), (b.second, b.second_formats))
        for step in self.memory_steps:
            yield from ((name, tuple(f for f, _ in sizes)) for name, sizes in step.live)
        for tie in self.ties:
            yield from ((name, ()) for name in tie.decisions)

    def _costs(self) -> Iterator[tuple[str, float]]:
        for (name, format_), o in self.option_of.items():
            for cost in (o.loss, o.squared_error, o.size_bytes, o.latency_us, o.bops, o.stored_bits):
                yield f"{name} in {format_}", cost
        for b in self.boundaries:
            yield from ((f"the conversion {b.first} → {b.second}", cost) for cost in (b.size_bytes, b.latency_us))
        for step in self.memory_steps:
            yield from ((f"memory at {step.node}", size) for _, sizes in step.live for _, size in sizes)
            yield f"memory at {step.node}", step.fixed_bytes
        yield from (("the fixed part", c) for c in (self.fixed_size_bytes, self.fixed_latency_us, self.fixed_bops))
