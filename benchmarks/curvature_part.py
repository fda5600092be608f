"""What each part of ``curvature.py`` hands back."""

from __future__ import annotations

from dataclasses import dataclass, field

from claims import Claim

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """``text``: for people. ``rows``: the same figures for JSON."""

    text: str
    rows: dict[str, object]
    claims: list[Claim] = field(default_factory=list)
