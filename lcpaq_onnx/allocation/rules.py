"""Which choices of an allocation go together, and what together they cost. ``AllocationProblem`` gives the meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AnyOf", "Boundary", "Conjunction", "MemoryStep", "Requirement", "Terms", "Tie", "live_bytes"]

Terms = tuple[tuple[str, tuple[str, ...]], ...]
"""Pairs (decision, formats); a term holds when the decision takes one of the formats."""


@dataclass(frozen=True)
class Requirement:
    """``decision`` in ``formats`` ⇒ ``needs`` in ``needed_formats`` (none: those formats are forbidden)."""

    decision: str
    formats: tuple[str, ...]
    needs: str
    needed_formats: tuple[str, ...]


@dataclass(frozen=True)
class Conjunction:
    """``decision`` == ``format`` ⇔ all ``terms`` hold (an Add runs in integer iff all its tensors are 8 bit)."""

    decision: str
    format: str
    terms: Terms


@dataclass(frozen=True)
class AnyOf:
    """``decision`` == ``format`` ⇔ at least one of ``terms`` holds (a table is stored iff any layer reads it)."""

    decision: str
    format: str
    terms: Terms


@dataclass(frozen=True)
class Boundary:
    """Cost of a conversion, paid when ``first`` is in ``first_formats`` and ``second`` in ``second_formats``; >= 0."""

    first: str
    first_formats: tuple[str, ...]
    second: str
    second_formats: tuple[str, ...]
    size_bytes: int = 0
    latency_us: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Tie:
    """All ``decisions`` take the same format text."""

    decisions: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class MemoryStep:
    """Bytes alive while ``node`` runs: ``fixed_bytes`` and, per decision, those of its format (0 where not listed)."""

    node: str
    fixed_bytes: int
    live: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()


def live_bytes(step: MemoryStep, assignment: Mapping[str, str]) -> int:
    """Bytes alive at ``step`` under ``assignment``."""
    return step.fixed_bytes + sum(dict(sizes).get(assignment[name], 0) for name, sizes in step.live)
