"""A benchmark's targets beside what was measured, and plain text tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Claim", "claim_table", "claims_as_json", "summary", "table"]


@dataclass(frozen=True)
class Claim:
    """``value`` must be at least or at most ``limit``; ``detail`` says against what it was measured."""

    name: str
    value: float
    relation: Literal["<=", "<", ">="]
    limit: float
    detail: str = ""

    @property
    def met(self) -> bool:
        if self.relation == ">=":
            return self.value >= self.limit
        return self.value < self.limit if self.relation == "<" else self.value <= self.limit


def claims_as_json(claims: Iterable[Claim]) -> list[dict[str, object]]:
    return [{**asdict(claim), "met": claim.met} for claim in claims]


def claim_table(claims: Iterable[Claim]) -> str:
    rows = [
        ("met" if c.met else "MISSED", c.name, f"{_number(c.value)} {c.relation} {_number(c.limit)}", c.detail)
        for c in claims
    ]
    return table(("", "target", "measured", "against"), rows)


def summary(claims: Sequence[Claim]) -> tuple[str, int]:
    """The last words of a benchmark, and its exit code: 0 all met, 1 some missed."""
    missed = sum(not claim.met for claim in claims)
    return f"== targets: {len(claims) - missed} met, {missed} missed\n{claim_table(claims)}", 1 if missed else 0


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.5g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the last one as it is."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
