"""Latency tables: measured run times of operators, one CSV beside the target's descriptor."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lcpaq_onnx.errors import TargetError

__all__ = ["COLUMNS", "LatencyEstimate", "LatencyRow", "LatencyTable", "read_latency_table"]

COLUMNS = ("op", "detail", "executed", "latency_us", "spread_us")


@dataclass(frozen=True)
class LatencyEstimate:
    """Run time of one node in microseconds, dispatch included, and where the figure comes from."""

    latency_us: float
    source: Literal["table", "roofline"]


@dataclass(frozen=True)
class LatencyRow:
    """One measurement. ``latency_us``: undisturbed, with dispatch. ``spread_us``: what disturbed runs took more."""

    op: str
    detail: str
    executed: str
    latency_us: float
    spread_us: float


@dataclass(frozen=True)
class LatencyTable:
    """``rows``: (signature key, executed format) → measurement. ``provenance``: device, runtime, threads, date."""

    rows: Mapping[tuple[str, str], LatencyRow] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)


def read_latency_table(path: Path) -> LatencyTable:
    """Read a table: lines ``# key=value`` of provenance, then CSV with the columns ``COLUMNS``.

    Raises TargetError on other columns, figures that are not positive numbers, or a row that occurs twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TargetError(
            f"cannot read latency table {path}: {error.strerror}", hint="check the file's permissions"
        ) from error
    provenance = dict(_provenance(line) for line in lines if line.startswith("#") and "=" in line)
    reader = csv.DictReader(line for line in lines if line.strip() and not line.startswith("#"))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise TargetError(
            f"{path}: columns {', '.join(reader.fieldnames or ()) or 'missing'}",
            hint=f"the header line must be {','.join(COLUMNS)}",
        )
    rows: dict[tuple[str, str], LatencyRow] = {}
    for record in reader:
        row = _row(record, path)
        key = (f"{row.op} {row.detail}", row.executed)
        if key in rows:
            raise TargetError(f"{path}: '{key[0]}' in {key[1]} occurs twice", hint="keep one row of the two")
        rows[key] = row
    return LatencyTable(rows, provenance)


def _provenance(line: str) -> tuple[str, str]:
    key, _, value = line.lstrip("# ").partition("=")
    return key.strip(), value.strip()


def _row(record: dict[str, str], path: Path) -> LatencyRow:
    try:
        latency_us, spread_us = float(record["latency_us"]), float(record["spread_us"])
    except (TypeError, ValueError) as error:
        raise TargetError(
            f"{path}: '{record['op']} {record['detail']}' has no valid figures", hint="write microseconds as numbers"
        ) from error
    if not (0 < latency_us < float("inf") and 0 <= spread_us < float("inf")):
        raise TargetError(
            f"{path}: '{record['op']} {record['detail']}': latency {latency_us} us, spread {spread_us} us",
            hint="latency_us must be positive and spread_us not negative",
        )
    return LatencyRow(record["op"], record["detail"], record["executed"], latency_us, spread_us)
