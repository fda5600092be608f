"""``lcpaq analyze``, ``plan``, ``apply``, ``verify``: the steps of ``quantize``, over files."""

from __future__ import annotations

import argparse
from pathlib import Path

from lcpaq_onnx.cli import arguments, measuring
from lcpaq_onnx.cli.console import Console
from lcpaq_onnx.cli.parser import CommandGroup
from lcpaq_onnx.cli.quantize import report_exit_code

__all__ = ["add_to"]

_ANALYZE = f"""\
{arguments.DATA_HELP}

examples:
  lcpaq analyze net.onnx --calibration data.npz -o net.analysis.json
  lcpaq analyze net.onnx --calibration photos/ --samples 512 --sensitivity-samples 128 -o net.analysis.json
"""
_PLAN = f"""\
With --analysis the model is read but not run. With --calibration the analysis is taken from the cache if `analyze`,
`plan` or `pareto` made it before on this model, these data and settings; else it is made, and kept.

{arguments.DATA_HELP}

examples:
  lcpaq plan net.onnx --analysis net.analysis.json --budget 'size<=0.16x' -o small.plan.json
  lcpaq plan net.onnx --analysis net.analysis.json --target generic-int8 --objective latency -o fast.plan.json
  lcpaq plan net.onnx --calibration data.npz --budget 'size<=0.12x' -o smaller.plan.json
"""
_APPLY = """\
Applying a plan twice gives the same bytes. A plan that rounds weights with compensation (any with less than 8 bits, as
a rule) or that has rewrites needs the calibration data that it was made with.

examples:
  lcpaq apply net.onnx fast.plan.json -o fast.onnx
  lcpaq apply net.onnx small.plan.json --calibration data.npz -o small.onnx
"""
_VERIFY = f"""\
{arguments.DATA_HELP}

examples:
  lcpaq verify net.onnx small.onnx --calibration data.npz                          (plan: small.plan.json)
  lcpaq verify net.onnx small.onnx --plan small.plan.json --calibration data.npz --json

exit codes: 0 all checks passed, 1 a check failed, 2 wrong usage, 3 bad model, data, target or file
"""


def add_to(commands: CommandGroup) -> None:
    parser = commands.add("analyze", "measure ranges and sensitivities of a model, once", _ANALYZE, command=_analyze)
    arguments.add_model(parser)
    arguments.add_data(parser)
    arguments.add_settings(parser)
    measuring.add_execution(parser)
    arguments.add_output(parser, "OUT.analysis.json", "the measurements")
    arguments.add_printing(parser, "the measurements")

    parser = commands.add("plan", "choose the formats, from an analysis or the cache", _PLAN, command=_plan)
    arguments.add_model(parser)
    measuring.add_measurements(parser)
    arguments.add_target(parser)
    arguments.add_budgets(parser)
    parser.add_argument(
        "--objective",
        choices=arguments.OBJECTIVES,
        help="what to minimise (default: latency with an error budget; else error, or latency where that is as good)",
    )
    arguments.add_output(parser, "OUT.plan.json", "the plan")
    arguments.add_printing(parser, "the plan")

    parser = commands.add("apply", "write the quantized model that a plan describes", _APPLY, command=_apply)
    arguments.add_model(parser)
    parser.add_argument("plan", type=Path, metavar="PLAN.plan.json", help="what `lcpaq plan` wrote")
    arguments.add_data(parser, required=False)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --random-data (default: %(default)s)")
    arguments.add_output(parser, "OUT.onnx", "the quantized model")
    arguments.add_printing(parser, "path, size and plan hash")

    parser = commands.add(
        "verify", "check a quantized model against its plan and the float model", _VERIFY, command=_verify
    )
    arguments.add_model(parser)
    parser.add_argument("emitted", type=Path, metavar="OUT.onnx", help="the quantized model")
    parser.add_argument("--plan", type=Path, metavar="PLAN", help="its plan (default: OUT.plan.json beside it)")
    arguments.add_data(parser)
    parser.add_argument("--loss", choices=arguments.LOSSES, default="auto", help="what counts as error")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --random-data (default: %(default)s)")
    arguments.add_output(parser, "OUT.report.json", "write the report there as well", required=False)
    arguments.add_printing(parser, "the report")


def _analyze(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx.artefacts import check_writable, measurements_json, write_texts
    from lcpaq_onnx.cli.summaries import measurements_text

    arguments.refuse_same_file((args.output,), (args.model, args.calibration))
    check_writable((args.output,))
    measurements = measuring.analyzed(args, console)
    written = measurements_json(measurements)
    write_texts({args.output: written})
    console.result(f"{measurements_text(measurements)}\nwrote {args.output}", written)
    return 0


def _plan(args: argparse.Namespace, console: Console) -> int:
    budgets = arguments.budgets(args)
    from lcpaq_onnx.artefacts import check_writable, write_texts
    from lcpaq_onnx.cli.summaries import plan_text
    from lcpaq_onnx.planning.replanning import allocate
    from lcpaq_onnx.targets.loader import load as load_target

    arguments.refuse_same_file((args.output,), (args.model, args.analysis, args.calibration))
    check_writable((args.output,))
    target = load_target(args.target)  # a typo must not wait for the analysis
    plan = allocate(
        args.model,
        measuring.measurements(args, console),
        target=target,
        budget=budgets,
        objective=args.objective,
        weights=args.weights,
        activations=args.activations,
    )
    write_texts({args.output: plan.to_json()})
    console.result(f"{plan_text(plan)}\nwrote {args.output}", plan.to_json())
    return 0


def _apply(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx import compiler
    from lcpaq_onnx.artefacts import check_writable
    from lcpaq_onnx.graph import graph_io
    from lcpaq_onnx.planning.plan import Plan

    arguments.refuse_same_file((args.output,), (args.model, args.plan, args.calibration))
    check_writable((args.output,))
    plan = Plan.load(args.plan)
    data = None if args.calibration is None and args.random_data is None else arguments.calibration(args)
    graph = compiler.apply(args.model, plan, data, samples=args.samples, progress=console.progress())
    graph_io.save(graph, args.output)
    size_bytes = args.output.stat().st_size
    document = {"model": str(args.output), "size_bytes": size_bytes, "plan_sha256": plan.sha256()}
    console.result(f"wrote {args.output}: {size_bytes:,} bytes by plan {plan.sha256()[:12]}", document)
    return 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx import compiler
    from lcpaq_onnx.artefacts import ArtefactPaths, check_writable, write_texts
    from lcpaq_onnx.planning.bench import Settings
    from lcpaq_onnx.planning.plan import Plan
    from lcpaq_onnx.verification.report_text import render_text

    plan_path = args.plan or ArtefactPaths.beside(args.emitted).plan
    if args.output is not None:
        arguments.refuse_same_file((args.output,), (args.model, args.emitted, plan_path, args.calibration))
        check_writable((args.output,))
    plan = Plan.load(plan_path)
    report = compiler.verify(
        args.model,
        args.emitted,
        arguments.calibration(args),
        plan,
        samples=args.samples,
        settings=Settings(loss=args.loss),
    )
    if args.output is not None:
        write_texts({args.output: report.to_json()})
    console.result(render_text(report), report.to_json())
    return report_exit_code(report, console)
