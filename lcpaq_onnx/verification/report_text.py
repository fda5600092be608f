"""The report as plain text for reading: what went wrong first, then what was gained, then the tables."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable

from lcpaq_onnx.verification.report import ActivationRow, LayerRow, Report, Totals
from lcpaq_onnx.verification.text_table import Column, shorten, table_lines

__all__ = ["render_text"]

_LEAST_WIDTH = 100
# Below it the layer table leaves out the columns that say least, and shortens names further.
_FULL_WIDTH = 132
_LEFT_OUT = ("bits", "storage", "params")
_NAME_WIDTH, _SHORT_NAME_WIDTH = 30, 22
_ACTIVATION_NAME_WIDTH = 44
_MOST_ACTIVATIONS = 8
_NONE = "–"


def render_text(report: Report, width: int = 132) -> str:
    """Plain text without colours, ends in a newline. Lines have at most ``width`` characters (at least 100), tables of
    wide entries aside.
    """
    width = max(_LEAST_WIDTH, width)
    sections = [
        _heading(report),
        _problems(report, width),
        _headline(report),
        _totals(report, width),
        _layers(report, width),
        _activations(report, width),
        _proof(report, width),
        _sensitivity(report, width),
        _rounding(report, width),
        _rewrites(report, width),
        _checks(report, width),
        _environment(report, width),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


# ---- what matters first ---------------------------------------------------------------------------------------------
def _heading(report: Report) -> list[str]:
    done = sum(check.passed for check in report.checks)
    verdict = (
        f"all {done} checks passed"
        if report.passed
        else f"{len(report.failed_checks)} of {len(report.checks)} checks FAILED"
    )
    return [f"{report.source.name} -> {report.emitted.name}", f"target {report.target}: {verdict}"]


def _problems(report: Report, width: int) -> list[str]:
    texts = [f"FAILED   {check.name}: {check.detail}" for check in report.failed_checks]
    texts += [f"warning  {warning}" for warning in report.warnings]
    return [line for text in texts for line in _wrap(text, width, " " * 9)]


def _headline(report: Report) -> list[str]:
    source, emitted = report.source.size_bytes, report.emitted.size_bytes
    change = f"{_times(source / emitted)} smaller" if emitted <= source else f"{_times(emitted / source)} LARGER"
    lines = [f"  size     {change}: {_bytes(source)} -> {_bytes(emitted)}"]
    if timing := report.latency:
        change = f"{_times(timing.speedup)} faster" if timing.speedup >= 1 else f"{_times(1 / timing.speedup)} SLOWER"
        before, after = _time(timing.float_median_us), _time(timing.median_us)
        lines.append(f"  speed    {change}: {before} -> {after} per sample")
    if (load_ms := report.measured.load_ms) is not None and (before_ms := report.float_measured.load_ms) is not None:
        lines.append(f"  load     {_time(before_ms * 1000)} -> {_time(load_ms * 1000)}")
    if bits := report.bits:
        lines.append(
            f"  bits     {bits.stored:.2f} stored for a weight ({bits.stored_in_all:.2f} with its scale and nodes),"
            f" {bits.executed:.3g} executed"
        )
    if report.measured.relative_error is not None:
        kept = report.measured.agreement
        decisions = f", {kept:.1%} of decisions kept" if kept is not None else ""
        lines.append(f"  error    {report.measured.relative_error:.2%} of the output's range{decisions}")
    if kernels := report.kernels:
        layers = f"{kernels.integer_layers} of {kernels.layers} layers"
        lines.append(f"  kernels  integer MACs {kernels.integer_share:.1%} ({layers})")
    return lines


# ---- promised and measured ------------------------------------------------------------------------------------------
def _totals(report: Report, width: int) -> list[str]:
    columns = [
        Column(""),
        *(Column(t, right=True) for t in ("float", "promised", "of float", "measured", "of float")),
    ]
    rows = [
        _ratio_row(report, "size", "size_bytes", _bytes),
        _ratio_row(report, "latency", "latency_us", _time),
        _ratio_row(report, "bit operations", "bops", _count),
        _ratio_row(report, "peak memory", "peak_memory_bytes", _bytes),
    ]
    promised, measured = report.promised, report.measured
    spread = "" if measured.loss_stderr is None else f" ± {measured.loss_stderr:.1g}"
    loss = _NONE if measured.loss is None else f"{measured.loss:.3g}{spread}"
    rows.append([f"loss ({report.loss_name or 'none'})", "0", _number(promised.loss), "", loss, ""])
    rows.append(["relative error", "0", _percent(promised.relative_error), "", _percent(measured.relative_error), ""])
    if report.latency is not None:
        rows[1][-1] = f"{1 / report.latency.speedup:.3f}x"  # paired, as in the headline; not the quotient of medians
    if measured.agreement is not None:
        rows.append(["decisions kept", "100%", _NONE, "", _percent(measured.agreement), ""])
    note = _wrap(f"  measured errors: {report.samples} samples of {report.calibration}", width, "  ")
    return ["Promised and measured", *table_lines(columns, rows), *note]


def _ratio_row(report: Report, title: str, field: str, show: Callable[[float], str]) -> list[str]:
    reference = _value(report.float_measured, field)
    reference = _value(report.float_promised, field) if reference is None else reference
    cells = [title, _NONE if reference is None else show(reference)]
    for totals, base in ((report.promised, report.float_promised), (report.measured, report.float_measured)):
        value, whole = _value(totals, field), _value(base, field)
        cells.append(_NONE if value is None else show(value))
        cells.append("" if value is None or not whole else f"{value / whole:.3f}x")
    return cells


# ---- tables ---------------------------------------------------------------------------------------------------------
def _layers(report: Report, width: int) -> list[str]:
    titles = ("layer", "op", "format", "bits", "kernel", "storage")
    numbers = ("params", "bytes", "MMACs", "loss", "")
    columns = [*(Column(t) for t in titles), *(Column(t, right=True) for t in numbers), Column("why")]
    is_full = width >= _FULL_WIDTH
    rows = [_layer(row, _NAME_WIDTH if is_full else _SHORT_NAME_WIDTH) for row in report.layers]
    rows.append(_layer_total(report))
    if not is_full:
        kept = [index for index, column in enumerate(columns) if column.title not in _LEFT_OUT]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    formats = Counter(row.format for row in report.layers)
    summary = ", ".join(f"{count} x {format}" for format, count in sorted(formats.items()))
    summary += "; bits: stored/executed" if is_full else ""
    return [*_wrap(f"Layers: {summary}", width, "  "), *table_lines(columns, rows, width=width, total=True)]


def _layer(row: LayerRow, name_width: int) -> list[str]:
    kernel = row.kernel or "not found"
    why = row.float_reason or row.reason
    return [
        shorten(row.name, name_width),
        row.op,
        row.format,
        f"{row.stored_bits}/{row.executed_bits}",
        kernel,
        row.storage,
        f"{row.parameters:,}",
        f"{row.size_bytes:,}",
        f"{row.macs / 1e6:.3f}",
        _number(row.loss),
        _spread(row.loss, row.loss_stderr),
        why,
    ]


def _layer_total(report: Report) -> list[str]:
    rows = report.layers
    loss, stderr = sum(row.loss for row in rows), sum(row.loss_stderr**2 for row in rows) ** 0.5
    return [
        f"{len(rows)} layers",
        *[""] * 5,
        f"{sum(row.parameters for row in rows):,}",
        f"{sum(row.size_bytes for row in rows):,}",
        f"{sum(row.macs for row in rows) / 1e6:.3f}",
        _number(loss),
        _spread(loss, stderr),
        "",
    ]


def _activations(report: Report, width: int) -> list[str]:
    if not report.activations:
        return []
    formats = Counter(row.format for row in report.activations)
    summary = ", ".join(f"{count} x {format}" for format, count in sorted(formats.items()))
    ranked = sorted(report.activations, key=lambda row: (-row.loss, row.name))
    shown = [row for row in ranked if row.format != "f32"][:_MOST_ACTIVATIONS]
    columns = [Column("activation"), Column("format")]
    columns += [Column(t, right=True) for t in ("tensors", "low", "high", "scale", "zero", "loss", "")]
    lines = [f"Activations: {summary}"]
    if not shown:
        return lines
    if len(shown) < len(ranked):
        lines[0] += f"; the {len(shown)} that cost most"
    return [*lines, *table_lines(columns, [_activation(row) for row in shown], width=width)]


def _activation(row: ActivationRow) -> list[str]:
    low, high = ("", "") if row.range is None else (f"{row.range[0]:.4g}", f"{row.range[1]:.4g}")
    name = shorten(row.name, _ACTIVATION_NAME_WIDTH)
    numbers = [f"{row.scale:.4g}", str(row.zero_point), _number(row.loss), _spread(row.loss, row.loss_stderr)]
    return [name, row.format, str(row.tensors), low, high, *numbers]


# ---- the rest -------------------------------------------------------------------------------------------------------
def _proof(report: Report, width: int) -> list[str]:
    proof = report.proof
    proved = f"proved within {proof.gap:.2%} of the optimum" if proof.gap else "proved optimal"
    state = proved if proof.optimal else f"not proved optimal (gap {proof.gap:.2%})"
    goal = f"least {', then '.join(report.objective)}" if report.objective else "plan"
    within = f" within {', '.join(report.budgets)}" if report.budgets else ""
    lines = [f"Plan: {goal}{within}; {state} under its model of error and cost, by {proof.solver}"]
    lines += [f"  {price}" for price in proof.shadow_prices]
    if proof.exchanged:
        lines.append(f"  then, by cross terms and with a lower measured error: {'; '.join(proof.exchanged)}")
    return [part for line in lines for part in _wrap(line, width, "  ")]


def _sensitivity(report: Report, width: int) -> list[str]:
    found = report.sensitivity
    if found is None:
        return []
    measured = f"{found.measured_entries} of {found.entries} layers x widths measured on {found.samples} samples"
    lines = [f"Errors: by {found.estimator}, {measured}"]
    if (audit := found.audit) is not None:
        lines.append(
            f"  audit: {len(audit.measured)} random plans, predicted against measured: rank correlation"
            f" {audit.rank_correlation:.2f} ({audit.low:.2f} to {audit.high:.2f} with 95 % confidence)"
        )
    lines += [f"  {found.note}"] if found.note else []
    return [part for line in lines for part in _wrap(line, width, "  ")]


def _rounding(report: Report, width: int) -> list[str]:
    if not report.rounding_samples:
        return []
    text = f"Rounding: compensated, by the first {report.rounding_samples} calibration samples"
    return _wrap(text, width, "  ")


def _rewrites(report: Report, width: int) -> list[str]:
    if not report.rewrites:
        return []
    text = f"Rewrites: {', '.join(report.rewrites)}"
    if report.loss_without_rewrites is not None and report.measured.loss is not None:
        text += f": measured loss {report.loss_without_rewrites:.3g} -> {report.measured.loss:.3g}"
    return _wrap(text, width, "  ")


def _checks(report: Report, width: int) -> list[str]:
    longest = max((len(check.name) for check in report.checks), default=0)
    lines = ["Checks"]
    for check in report.checks:
        mark = "ok    " if check.passed else "FAILED"
        lines += _wrap(f"  {mark} {check.name:<{longest}}  {check.detail}", width, " " * (longest + 11))
    return lines


def _environment(report: Report, width: int) -> list[str]:
    where = report.environment
    lines = [
        f"Measured with ONNX Runtime {where.onnxruntime} on {where.machine}, {where.threads} of {where.cpu_count} CPUs",
        f"lcpaq {report.tool_version}, plan {report.plan_sha256[:12]}, file {report.emitted.sha256[:12]}",
    ]
    if timing := report.latency:
        spread = f"{timing.speedup_low:.2f} to {timing.speedup_high:.2f}"
        lines[0] += f"; {timing.rounds} timing rounds in turns, middle half of the speed-ups {spread}"
    return [part for line in lines for part in _wrap(line, width, "  ")]


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _value(totals: Totals, field: str) -> float | None:
    value = getattr(totals, field)
    return None if value is None else float(value)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _bytes(value: float) -> str:
    """Decimal units, as budgets count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.0f} B"


def _time(microseconds: float) -> str:
    return f"{microseconds / 1000:.3g} ms" if microseconds >= 1000 else f"{microseconds:.3g} us"


def _count(value: float) -> str:
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.0f}"


def _number(value: float | None) -> str:
    return _NONE if value is None else "0" if not value else f"{value:.1e}"


def _spread(value: float, stderr: float) -> str:
    """Standard error as a part of the value."""
    return f"±{stderr / value:.0%}" if value and stderr else ""


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2%}"
