"""Tables of plain text: aligned columns, long names shortened in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Column", "shorten", "table_lines"]

# What is left of a last column that has to give way.
_LEAST_LAST_WIDTH = 16


@dataclass(frozen=True)
class Column:
    """``right``: cells are set to the right, as numbers are."""

    title: str
    right: bool = False


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters; the middle of a longer one becomes ``…``, since names differ at their
    ends.
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def table_lines(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], *, width: int = 0, total: bool = False
) -> list[str]:
    """Aligned lines with a rule below the titles, and above the last row where it is a ``total``. With a ``width`` the
    last column is shortened to what is left of it.
    """
    cells = [[column.title for column in columns], *map(list, rows)]
    sizes = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    if width:
        used = sum(sizes[:-1]) + 2 * len(sizes)
        sizes[-1] = min(sizes[-1], max(_LEAST_LAST_WIDTH, width - used))
    lines = [_line(columns, sizes, row) for row in cells]
    rule = ("  " + "  ".join("-" * size for size in sizes)).rstrip()
    lines.insert(1, rule)
    if total:
        lines.insert(-1, rule)
    return lines


def _line(columns: Sequence[Column], sizes: Sequence[int], row: Sequence[str]) -> str:
    parts = []
    for column, size, cell in zip(columns, sizes, row, strict=True):
        text = cell if len(cell) <= size else cell[: size - 1] + "…"
        parts.append(text.rjust(size) if column.right else text.ljust(size))
    return ("  " + "  ".join(parts)).rstrip()
