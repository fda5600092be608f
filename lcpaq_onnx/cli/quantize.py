"""``lcpaq quantize``: the main job in one command."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.cli import arguments, measuring
from lcpaq_onnx.cli.console import Console
from lcpaq_onnx.cli.parser import CommandGroup

if TYPE_CHECKING:
    from lcpaq_onnx.verification.report import Report

__all__ = ["add_to", "report_exit_code"]

_EPILOG = f"""\
writes, each whole or not at all, for -o small.onnx:
  small.onnx         the quantized model
  small.plan.json    every decision with its reason; `lcpaq apply` makes the same bytes of it again
  small.report.json  what was promised beside what was measured, for machines
  small.report.txt   the same for people

{arguments.DATA_HELP}

Without --budget and --objective: the fastest plan whose measured error stays within 1 % of the output's scale with 99 %
of the decisions kept. With a budget on size, latency, bops, bits or peak_memory: the plan of least error, or a faster
one whose error is as good; with one on error: the fastest, then smallest plan.

examples:
  lcpaq quantize net.onnx --calibration data.npz -o net.int8.onnx
  lcpaq quantize net.onnx --calibration photos/ --budget 'size<=0.16x' --samples 256 -o small.onnx
  lcpaq quantize net.onnx --calibration data.npz --budget 'error<=1%' --weights 4,8 --json -o net.w48.onnx

exit codes: 0 done, 1 budget not met or a check of the written file failed (the files are written and say which),
2 wrong usage, 3 bad model, data, target or file
"""

_FILE_WIDTH = 220


def add_to(commands: CommandGroup) -> None:
    parser = commands.add("quantize", "measure, plan, write and verify a quantized model", _EPILOG, command=_quantize)
    arguments.add_model(parser)
    arguments.add_data(parser)
    arguments.add_target(parser)
    arguments.add_budgets(parser)
    parser.add_argument(
        "--objective", choices=arguments.OBJECTIVES, help="what to minimise (default: what fits the budgets, see below)"
    )
    arguments.add_settings(parser)
    arguments.add_migration(parser)
    measuring.add_execution(parser)
    arguments.add_output(parser, "OUT.onnx", "the quantized model; the other files stand beside it")
    arguments.add_printing(parser, "the report")


def report_exit_code(report: Report, console: Console) -> int:
    """0, or 1 after naming the failed checks on stderr."""
    failed = [check for check in report.checks if not check.passed]
    for check in failed:
        console.complain(f"check '{check.name}' failed: {check.detail}")
    return 1 if failed else 0


def _quantize(args: argparse.Namespace, console: Console) -> int:
    budgets = arguments.budgets(args)
    from lcpaq_onnx import compiler
    from lcpaq_onnx.artefacts import ArtefactPaths, check_writable, write_texts
    from lcpaq_onnx.verification.report_text import render_text

    paths = ArtefactPaths.beside(args.output)
    arguments.refuse_same_file(paths.all, (args.model, args.calibration))
    check_writable(paths.all)
    result = compiler.quantize(
        args.model,
        arguments.calibration(args),
        target=args.target,
        budget=budgets,
        objective=args.objective,
        weights=args.weights,
        activations=args.activations,
        samples=args.samples,
        settings=replace(arguments.settings(args), migration=args.migration),
        execution=measuring.execution(args),
        progress=console.progress(),
    )
    # Only here is the name known that the emitted file will have.
    report = result.report.model_copy(
        update={"emitted": result.report.emitted.model_copy(update={"name": paths.model.name})}
    )
    # The file has room for whole reasons, a terminal often has not.
    report_json, text = report.to_json(), render_text(report, _FILE_WIDTH)
    # The model comes last: where it stands, the files that explain it stand too.
    write_texts({paths.plan: result.plan.to_json(), paths.report: report_json, paths.report_text: text})
    result.save(paths.model)
    console.result(f"{render_text(report).rstrip()}\n\nwrote {_names(paths.all)}", report_json)
    return report_exit_code(report, console)


def _names(paths: tuple[Path, ...]) -> str:
    return ", ".join(str(path) for path in paths)
