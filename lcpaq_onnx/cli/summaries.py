"""Plans, measurements and frontiers as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lcpaq_onnx.cli.console import text_table
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.tables import ErrorEntry, Measurements, Sensitivity

__all__ = ["frontier_document", "frontier_text", "measurements_text", "plan_text"]


def plan_text(plan: Plan) -> str:
    """Totals beside the float model's, the proof, and one row for each layer."""
    p = plan.predicted
    totals = text_table(
        ["predicted", "plan", "float", "ratio"],
        [
            _total("size (bytes)", p.size_bytes, p.float_size_bytes),
            _total("latency (us)", p.latency_us, p.float_latency_us),
            _total("bit operations", p.bops, p.float_bops),
            _total("peak memory (bytes)", p.peak_memory_bytes, p.float_peak_memory_bytes),
        ],
    )
    rows = [
        [
            layer.name,
            layer.op,
            layer.format,
            layer.executed,
            layer.storage,
            f"{layer.size_bytes:,}",
            f"{layer.latency_us:.1f}",
            f"{layer.loss:.2e}",
            layer.reason,
        ]
        for layer in plan.layers
    ]
    headers = ["layer", "op", "format", "executed", "storage", "bytes", "us", "loss", "reason"]
    quantized = [group for group in plan.activations if group.qformat is not None]
    lines = [
        f"plan {plan.sha256()[:12]} for {plan.target}",
        f"  budgets:   {', '.join(plan.budgets) or 'none'}",
        f"  objective: {', then '.join(plan.objective)}",
        f"  file:      opset {plan.opset}, IR version {plan.ir_version}",
        f"  layers:    {_counted(layer.format for layer in plan.layers)}",
        f"  tensors:   {len(quantized)} of {len(plan.activations)} activation groups quantized",
        f"  proof:     {_proof(plan)}",
        *(f"             {price}" for price in plan.proof.shadow_prices),
        f"  error:     loss {p.loss:.3e}, {p.relative_error:.2%} of the output's scale (to first order)",
        "",
        totals,
        text_table(headers, rows),
    ]
    return "\n".join(lines)


def measurements_text(measurements: Measurements) -> str:
    """One row for each layer, the most sensitive first: curvature, and the error of each stored width."""
    layers = measurements.errors.layers
    widths = sorted({bits for entries in layers.values() for bits in entries}, reverse=True)
    names = sorted(layers, key=lambda name: -max((entry.loss for entry in layers[name].values()), default=0.0))
    rows = [
        [name, *_curvature(measurements, name), *(_loss(layers[name].get(bits)) for bits in widths)] for name in names
    ]
    headers = ["layer", "Hessian trace", "± stderr", *(f"w{bits} loss" for bits in widths)]
    lines = [
        f"analysis of {measurements.source_sha256[:12]} on {measurements.calibration}",
        f"  loss:       {measurements.loss}",
        f"  tensors:    {len(measurements.tensors)} recorded, ranges of {len(measurements.ranges)}",
        *_sensitivity(measurements.sensitivity),
        "",
        text_table(headers, rows),
    ]
    return "\n".join(lines)


def frontier_document(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """One object for each point: predicted totals, and the format of each layer."""
    return [
        {
            **plan.predicted.model_dump(mode="json"),
            "optimal": plan.proof.optimal,
            "formats": {layer.name: layer.format for layer in plan.layers},
        }
        for plan in plans
    ]


def frontier_text(plans: Sequence[Plan]) -> str:
    """One row for each point."""
    rows = [
        [
            f"{p.size_bytes:,}",
            f"{p.size_bytes / p.float_size_bytes:.3f}x",
            f"{p.latency_us:.1f}",
            f"{p.bops:.3g}",
            f"{p.peak_memory_bytes:,}",
            f"{p.loss:.3e}",
            f"{p.relative_error:.2%}",
            _counted(layer.format for layer in plan.layers),
        ]
        for plan in plans
        for p in [plan.predicted]
    ]
    headers = ["size (bytes)", "size", "latency (us)", "bops", "memory (bytes)", "loss", "error", "layers"]
    return text_table(headers, rows)


def _sensitivity(found: Sensitivity | None) -> list[str]:
    if found is None:
        return []
    measured = f"{found.measured_entries} of {found.entries} layers x widths measured on {found.samples} samples"
    lines = [f"  estimator:  {found.estimator}, {measured}"]
    if (audit := found.audit) is not None:
        interval = f"{audit.rank_correlation:.2f} ({audit.low:.2f} to {audit.high:.2f} with 95 % confidence)"
        lines.append(f"  audit:      {len(audit.measured)} random plans, rank correlation {interval}")
    return [*lines, *([f"  note:       {found.note}"] if found.note else [])]


def _total(name: str, value: float, float_value: float) -> list[str]:
    ratio = f"{value / float_value:.3f}x" if float_value else ""
    digits = 0 if name != "latency (us)" else 1
    return [name, f"{value:,.{digits}f}", f"{float_value:,.{digits}f}", ratio]


def _proof(plan: Plan) -> str:
    proved = "optimal" if plan.proof.optimal else "not proven optimal"
    return f"{proved}, gap {plan.proof.gap:.2g} ({plan.proof.solver})"


def _counted(formats: Iterable[str]) -> str:
    counts = Counter(formats)
    return ", ".join(f"{count} {text}" for text, count in sorted(counts.items()))


def _curvature(measurements: Measurements, layer: str) -> list[str]:
    diagonal = measurements.hessian.get(layer)
    return ["", ""] if diagonal is None else [f"{diagonal.trace:.3e}", f"{diagonal.trace_stderr:.1e}"]


def _loss(entry: ErrorEntry | None) -> str:
    return "" if entry is None else f"{entry.loss:.2e}"
