"""``lcpaq pareto``: the plans between which a user has to choose."""

from __future__ import annotations

import argparse
import json
from typing import get_args

from lcpaq_onnx.budget import Dimension
from lcpaq_onnx.cli import arguments, measuring
from lcpaq_onnx.cli.console import Console
from lcpaq_onnx.cli.parser import CommandGroup

__all__ = ["add_to"]

DIMENSIONS = tuple(dimension for dimension in get_args(Dimension) if dimension != "error")

_EPILOG = f"""\
Each point is the plan of least error for that much of the dimension; none is dominated by another.

{arguments.DATA_HELP}

examples:
  lcpaq pareto net.onnx --analysis net.analysis.json
  lcpaq pareto net.onnx --calibration data.npz --workers threads:2
  lcpaq pareto net.onnx --analysis net.analysis.json --dimension latency --points 20 --json > frontier.json
  lcpaq pareto net.onnx --analysis net.analysis.json --budget 'latency<=0.5x' -o frontier.json
"""


def add_to(commands: CommandGroup) -> None:
    parser = commands.add("pareto", "sweep the frontier of error against size, latency, …", _EPILOG, command=_pareto)
    arguments.add_model(parser)
    measuring.add_measurements(parser)
    arguments.add_target(parser)
    parser.add_argument(
        "--dimension", choices=DIMENSIONS, default="size", help="what to trade error against (default: %(default)s)"
    )
    parser.add_argument(
        "--points", type=arguments.count, default=12, metavar="N", help="at most so many (default: %(default)s)"
    )
    arguments.add_budgets(parser)
    arguments.add_output(parser, "FRONTIER.json", "write the points there as JSON", required=False)
    arguments.add_printing(parser, "the points")


def _pareto(args: argparse.Namespace, console: Console) -> int:
    budgets = arguments.budgets(args)
    from lcpaq_onnx import compiler
    from lcpaq_onnx.artefacts import check_writable, write_texts
    from lcpaq_onnx.cli.summaries import frontier_document, frontier_text
    from lcpaq_onnx.targets.loader import load as load_target

    if args.output is not None:
        arguments.refuse_same_file((args.output,), (args.model, args.analysis, args.calibration))
        check_writable((args.output,))
    target = load_target(args.target)  # a typo must not wait for the analysis
    plans = compiler.frontier(
        args.model,
        measuring.measurements(args, console),
        dimension=args.dimension,
        target=target,
        budget=budgets,
        points=args.points,
        weights=args.weights,
        activations=args.activations,
    )
    written = json.dumps(frontier_document(plans), indent=1, ensure_ascii=False) + "\n"
    if args.output is not None:
        write_texts({args.output: written})
    console.result(frontier_text(plans), written)
    return 0
