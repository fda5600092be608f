"""``lcpaq inspect``: what a file says, model or artefact."""

from __future__ import annotations

import argparse
from pathlib import Path

from lcpaq_onnx.cli import arguments
from lcpaq_onnx.cli.console import Console
from lcpaq_onnx.cli.parser import CommandGroup
from lcpaq_onnx.errors import UsageError

__all__ = ["add_to"]

_EPILOG = """\
FILE is an ONNX model, or what lcpaq wrote: *.plan.json, *.report.json, *.analysis.json (known by its content).

examples:
  lcpaq inspect net.onnx
  lcpaq inspect small.onnx --json
  lcpaq inspect small.plan.json
"""


def add_to(commands: CommandGroup) -> None:
    parser = commands.add("inspect", "show what a model, plan, report or analysis holds", _EPILOG, command=_inspect)
    parser.add_argument("file", type=Path, metavar="FILE", help="an ONNX model or one of lcpaq's JSON files")
    arguments.add_printing(parser, "the summary of a model, or the artefact itself,")


def _inspect(args: argparse.Namespace, console: Console) -> int:
    if args.file.suffix == ".json":
        text, document = _artefact(args.file)
        console.result(text, document)
        return 0
    from lcpaq_onnx.cli.model_summary import summarize

    summary = summarize(args.file)
    console.result(summary.text(), summary.document())
    return 0


def _artefact(path: Path) -> tuple[str, str]:
    """Readable text and JSON. Each kind of artefact has a key that no other has."""
    import json

    from lcpaq_onnx.artefacts import measurements_json, read_measurements, read_text
    from lcpaq_onnx.cli.summaries import measurements_text, plan_text
    from lcpaq_onnx.planning.plan import Plan
    from lcpaq_onnx.verification.report import Report
    from lcpaq_onnx.verification.report_text import render_text

    hint = "give a file that lcpaq wrote, or an ONNX model"
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}", hint=hint) from error
    keys = set(data) if isinstance(data, dict) else set()
    if "proof" in keys and "checks" not in keys:
        plan = Plan.load(path)
        return plan_text(plan), plan.to_json()
    if "checks" in keys:
        report = Report.load(path)
        return render_text(report), report.to_json()
    if "hessian" in keys:
        measurements = read_measurements(path)
        return measurements_text(measurements), measurements_json(measurements)
    raise UsageError(f"{path} is no plan, report or analysis", hint=hint)
