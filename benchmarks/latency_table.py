"""Measures a target's latency table with ONNX Runtime, one operator at a time, and fits the target's roofline rates.

    python benchmarks/latency_table.py       # models/*.onnx, the classify models under LCPAQ_ASSETS, some common shapes
    python benchmarks/latency_table.py model.onnx --shape model.onnx:x=1x3x48x192 --out my-target.csv --seconds 300

Every distinct operator of the models (batch 1, shapes recorded by running them) is built alone, in float and, where
the target runs it in integer, between Q and DQ: Conv with the Relu that fuses into it, pools behind a Conv, uint8
activations, per-channel int8 weights. Both run alternately in one process; conversions and layout changes at the
probe's two ends do not count (see micro_runs.py). A row's latency is the mean of the fastest quarter of the runs,
dispatch included, in the fastest of several passes over all operators; its spread is what the median run of the slowest
pass took more. Rows already in the output file are kept (delete it to start afresh). Prints progress to stderr and a
summary as JSON to stdout.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import onnxruntime as ort
from micro_runs import Feeds, Times, conversion_ns_per_element, dispatch_us, kernel_times, session_us
from model_nodes import LayerNode, common_nodes, nodes_of
from roofline_fit import fit_rates, median_error

from lcpaq_onnx.graph.probe import build_probe
from lcpaq_onnx.signature import OperatorSignature
from lcpaq_onnx.targets.latency import COLUMNS, LatencyRow, read_latency_table
from lcpaq_onnx.targets.loader import load
from lcpaq_onnx.targets.target import Target

ROOT = Path(__file__).resolve().parent.parent
# Under LCPAQ_ASSETS; the fixed shape is for models whose height and width are free.
CLASSIFY_MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "cifar10/resnet20.onnx": {},
    "cifar10/mlperf_tiny_resnet8.onnx": {},
    "photos1000/effnet_lite0.onnx": {},
    "photos1000/mobilenetv2_160_coarse10.onnx": {},
    "photos1000/resnet50thin_coarse10.onnx": {},
    "coco128/vww_mobilenetv1.onnx": {},
    "keywords/dscnn.onnx": {},
    "ocr/cls.onnx": {"x": (1, 3, 48, 192)},
}


@dataclass
class Table:
    """The output file, rewritten after every row so that an interrupted run resumes."""

    path: Path
    provenance: dict[str, str]
    rows: dict[tuple[str, str], LatencyRow] = field(default_factory=dict)

    def resume(self) -> None:
        if not self.path.is_file():
            return
        found = read_latency_table(self.path)
        for key in ("device", "runtime", "threads"):
            if found.provenance.get(key) != self.provenance[key]:
                sys.exit(f"{self.path} was measured with {key} '{found.provenance.get(key)}', this is "
                         f"'{self.provenance[key]}': delete it or choose another --out")  # fmt: skip
        self.rows.update(found.rows)

    def add(self, signature: OperatorSignature, executed: str, times: Times) -> None:
        """Keeps the faster of two measurements: other load comes in phases longer than one measurement."""
        key = (signature.key, executed)
        typical_us, latency_us = times.latency_us + times.spread_us, times.latency_us
        if key in self.rows:
            typical_us = max(typical_us, self.rows[key].latency_us + self.rows[key].spread_us)
            latency_us = min(latency_us, self.rows[key].latency_us)
        self.rows[key] = LatencyRow(signature.op, signature.detail, executed, latency_us, typical_us - latency_us)
        partial = self.path.with_suffix(".csv.partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.writelines(f"# {key}={value}\n" for key, value in self.provenance.items())
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for _, row in sorted(self.rows.items()):
                writer.writerow([row.op, row.detail, row.executed, f"{row.latency_us:.2f}", f"{row.spread_us:.2f}"])
        os.replace(partial, self.path)


def device_name() -> str:
    """Processor model and the instruction sets that decide which kernels run."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = facts.get("flags", "").split()
    wanted = [
        flag for flag in ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags
    ]
    return " ".join([facts.get("model name", platform.machine()).strip(), *wanted])


def measure(node: LayerNode, target: Target, table: Table, repeats: int) -> None:
    """Add the rows of one operator. In integer only where the target says so and the runtime agrees."""
    signature = node.signature
    probes = {"f32": build_probe(node.probe, None, None)}
    if node.runs_int8(target):
        weight = target.weight_format(signature.op, 8, node.channel_axis) if node.probe.weighted else None
        probes["int8"] = build_probe(node.probe, target.activation_format(8), weight)
    # A Transpose counts when it is the operator itself, not where a kernel's layout needs one.
    only = "Transpose" if signature.op == "Transpose" else ""
    without = frozenset({"Conv", "FusedConv", "QLinearConv"} if node.probe.after_conv else ())
    measured = kernel_times(list(probes.values()), repeats, only, without)
    for executed, times in zip(probes, measured, strict=True):
        if executed == "int8" and not times.integer:
            print(f"  no integer kernel for {signature.key}", file=sys.stderr)
        elif times.latency_us > 0:
            table.add(signature, executed, times)


def run(options: argparse.Namespace) -> dict[str, object]:
    target = load(options.target)
    provenance = {
        "device": device_name(),
        "runtime": f"onnxruntime {ort.__version__}",
        "threads": str(target.runtime.threads),
        "date": date.today().isoformat(),
        "load_average": f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores",
    }
    table = Table(options.out, provenance)
    table.resume()
    models = {path: nodes_of(path, options.shapes.get(path.name, {})) for path in options.models}
    common = common_nodes() if options.common else []
    nodes = {node.signature.key: node for found in [*models.values(), common] for node in found}
    formats = {key: ("f32", "int8") if node.runs_int8(target) else ("f32",) for key, node in nodes.items()}
    missing = [node for key, node in nodes.items() if any((key, name) not in table.rows for name in formats[key])]
    started = time.perf_counter()
    for done, node in enumerate(missing * options.passes, 1):
        if time.perf_counter() - started > options.seconds:
            print(f"stopped after {options.seconds} s; run again to resume", file=sys.stderr)
            break
        measure(node, target, table, options.repeats)
        if done % 50 == 0 or done == len(missing) * options.passes:
            spent = time.perf_counter() - started
            print(f"{done}/{len(missing) * options.passes} measurements, {spent:.0f} s", file=sys.stderr)
    signatures = [node.signature for node in nodes.values()]
    measured = [
        (signature, executed, table.rows[signature.key, executed].latency_us)
        for signature in signatures
        for executed in ("f32", "int8")
        if (signature.key, executed) in table.rows
    ]
    dispatch = dispatch_us()
    fit = fit_rates(measured, dispatch)
    return {
        "table": str(options.out),
        "provenance": provenance,
        "rows": len(table.rows),
        "seconds": round(time.perf_counter() - started, 1),
        "fit": {executed: asdict(rates) for executed, rates in fit.items()},
        "fit_error": median_error(
            measured, lambda signature, executed: fit[executed].predict_us(signature, executed, dispatch)
        ),
        "shipped_rates_error": median_error(measured, target.roofline_us),
        "dispatch_us": dispatch,
        "conversion_ns_per_element": {bits: conversion_ns_per_element(bits) for bits in (8, 16)},
        "sum_of_f32_rows_over_model": {path.name: _whole(path, found, table) for path, found in models.items()},
    }


def _whole(path: Path, nodes: Sequence[LayerNode], table: Table) -> float:
    """How well rows add up: float rows of the operators that stay apart after fusion, over the model's own time."""
    keys = [(node.signature.key, "f32") for node in nodes if node.runs_apart]
    feeds: Feeds = {name: np.zeros(shape, np.float32) for name, shape in nodes[0].model_inputs.items()}
    return round(sum(table.rows[key].latency_us for key in keys if key in table.rows) / session_us(path, feeds), 3)


def default_models() -> Iterable[tuple[Path, dict[str, tuple[int, ...]]]]:
    yield from ((path, {}) for path in sorted((ROOT / "models").glob("*.onnx")))
    assets = os.environ.get("LCPAQ_ASSETS")
    for name, shapes in CLASSIFY_MODELS.items() if assets else ():
        path = Path(assets or "") / name
        if path.is_file():
            yield path, shapes


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--target", default="onnxruntime-cpu-x86_64-vnni", help="decides what is measured in integer")
    parser.add_argument("--out", type=Path, help="default: the built-in target's table in hw_targets/")
    parser.add_argument("--shape", action="append", default=[], metavar="MODEL.onnx:INPUT=1x3x48x192")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop measuring after so long; resumable")
    parser.add_argument("--repeats", type=int, default=100, help="alternating runs per operator, within 0.4 s")
    parser.add_argument("--passes", type=int, default=4, help="rounds in which all operators are measured")
    options = parser.parse_args(arguments)
    options.out = options.out or ROOT / "hw_targets" / f"{options.target}.csv"
    options.shapes = {}
    for text in options.shape:
        model, _, rest = text.partition(":")
        name, _, extents = rest.partition("=")
        options.shapes.setdefault(model, {})[name] = tuple(map(int, extents.split("x")))
    options.common = not options.models
    if not options.models:
        found = dict(default_models())
        options.models = list(found)
        options.shapes.update({path.name: shapes for path, shapes in found.items() if shapes})
    if not options.models:
        parser.error("no models: name some, or set LCPAQ_ASSETS")
    return options


if __name__ == "__main__":
    print(json.dumps(run(parse_arguments(sys.argv[1:])), indent=2))
