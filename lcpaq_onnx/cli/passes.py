"""``lcpaq passes``: which passes there are, and running a pipeline of them."""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.cli import arguments
from lcpaq_onnx.cli.console import Console, text_table
from lcpaq_onnx.cli.parser import CommandGroup
from lcpaq_onnx.errors import LcpaqError

if TYPE_CHECKING:
    from lcpaq_onnx.graph.graph_io import Graph
    from lcpaq_onnx.manager.analysis import AnalysisInputs
    from lcpaq_onnx.manager.pass_manager import Hook, StepDone
    from lcpaq_onnx.manager.registry import Entry
    from lcpaq_onnx.runtime.calibration import CalibrationData

__all__ = ["add_to"]

_VERIFIED_SAMPLES = 4

_EPILOG = """\
examples:
  lcpaq passes list
  lcpaq passes run net.onnx --pipeline fold-batch-norm,fold-constants -o folded.onnx
"""
_RUN = """\
A pipeline is the names of passes and analyses, with options in braces: raise-opset{to=21},insert-qdq

examples:
  lcpaq passes run net.onnx --pipeline fold-batch-norm --verify-each --calibration data.npz -o folded.onnx
  lcpaq passes run net.onnx --pipeline fold-batch-norm,canonical-names --print-after all --time-passes -o out.onnx
  lcpaq passes run net.onnx --pipeline round-nearest,insert-qdq --plan p.json --stop-after round-nearest -o out.onnx
"""


def add_to(commands: CommandGroup) -> None:
    group = CommandGroup(commands.add("passes", "list passes and run pipelines of them", _EPILOG))

    parser = group.add(
        "list", "name all passes and analyses, installed ones too", "example:\n  lcpaq passes list\n", command=_list
    )
    arguments.add_printing(parser, "names, kinds and summaries")

    parser = group.add("run", "run a pipeline on a model", _RUN, command=_run)
    arguments.add_model(parser, metavar="MODEL")
    parser.add_argument("--pipeline", required=True, metavar="TEXT", help="passes and analyses, with commas between")
    parser.add_argument("--plan", type=Path, metavar="PLAN", help="for passes that apply a plan")
    arguments.add_data(parser, required=False)
    arguments.add_target(parser, default=None)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers (default: %(default)s)")
    parser.add_argument(
        "--print-after",
        action="append",
        default=[],
        metavar="NAME",
        help="print the graph after that pass, or the result of that analysis, on stderr; 'all': after each",
    )
    parser.add_argument(
        "--verify-each",
        action="store_true",
        help="check the model after each pass; with calibration data also that exact passes keep the outputs",
    )
    parser.add_argument("--time-passes", action="store_true", help="print how long each took, on stderr")
    parser.add_argument("--stop-after", metavar="NAME", help="leave out what comes after that pass")
    arguments.add_output(parser, "OUT", "the rewritten model")
    arguments.add_printing(parser, "what each step did")


def _list(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx.manager.registry import installed_registry

    document = [_described(entry) for entry in installed_registry().entries.values()]
    rows = [[entry["name"], entry["kind"], entry["provider"], entry["summary"]] for entry in document]
    console.result(text_table(["name", "kind", "from", "what it does"], rows), document)
    return 0


def _described(entry: Entry) -> dict[str, str]:
    from lcpaq_onnx.manager.pass_base import RewritePass

    try:
        found = entry.load()
    except LcpaqError as error:  # one broken plug-in must not hide the rest
        return {"name": entry.name, "kind": "broken", "provider": entry.provider, "summary": error.message}
    kind = "pass" if issubclass(found, RewritePass) else "analysis"
    paragraph = (inspect.getdoc(found) or "").split("\n\n")[0]
    return {"name": entry.name, "kind": kind, "provider": entry.provider, "summary": " ".join(paragraph.split())}


def _run(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx.artefacts import check_writable
    from lcpaq_onnx.graph import graph_io
    from lcpaq_onnx.manager.pass_base import PassContext
    from lcpaq_onnx.manager.pass_manager import run_pipeline, timing_table
    from lcpaq_onnx.manager.pipeline import parse_pipeline, stop_after
    from lcpaq_onnx.manager.registry import installed_registry
    from lcpaq_onnx.planning.plan import Plan

    arguments.refuse_same_file((args.output,), (args.model, args.plan, args.calibration))
    check_writable((args.output,))
    steps = parse_pipeline(args.pipeline, installed_registry())
    if args.stop_after is not None:
        steps = stop_after(steps, args.stop_after)
    graph = graph_io.load(args.model)
    inputs = _inputs(args, graph, console)
    plan = None if args.plan is None else Plan.load(args.plan)
    run = run_pipeline(steps, PassContext.of(graph, inputs, plan), _hooks(args, inputs.calibration))
    graph_io.save(run.graph, args.output)
    for done in run.trace if console.verbosity else ():
        for note in _notes(done):
            console.note(f"{done.step.name}: {note}")
    if args.time_passes:
        print(timing_table(run.trace), file=sys.stderr)
    console.result(f"{_trace_text(run.trace)}\nwrote {args.output}", [_done(done) for done in run.trace])
    return 0


def _inputs(args: argparse.Namespace, graph: Graph, console: Console) -> AnalysisInputs:
    from lcpaq_onnx.graph import graph_io
    from lcpaq_onnx.manager.analysis import AnalysisInputs
    from lcpaq_onnx.runtime.calibration import open_calibration
    from lcpaq_onnx.runtime.session import Session, SessionOptions
    from lcpaq_onnx.targets.loader import load

    target = None if args.target is None else load(args.target)
    data = None
    if args.calibration is not None or args.random_data is not None:
        session = Session(graph_io.to_proto(graph), SessionOptions("basic"), base_dir=graph.base_dir)
        data = open_calibration(arguments.calibration(args), session.inputs, samples=args.samples)
    return AnalysisInputs(calibration=data, target=target, seed=args.seed, progress=console.progress())


def _hooks(args: argparse.Namespace, data: CalibrationData | None) -> list[Hook]:
    from lcpaq_onnx.manager.pass_hooks import PrintAfter, VerifyEach

    hooks: list[Hook] = []
    if args.verify_each:
        hooks.append(VerifyEach([] if data is None else list(itertools.islice(data, _VERIFIED_SAMPLES))))
    if args.print_after:
        hooks.append(PrintAfter(sys.stderr, None if "all" in args.print_after else args.print_after))
    return hooks


def _trace_text(trace: Sequence[StepDone]) -> str:
    return text_table(["step", "effect", "left alone"], [[str(d.step), _effect(d), str(len(_notes(d)))] for d in trace])


def _done(done: StepDone) -> dict[str, object]:
    return {"step": str(done.step), "effect": _effect(done), "seconds": done.seconds, "notes": _notes(done)}


def _effect(done: StepDone) -> str:
    if done.result is None:
        return "analysis"
    return "changed" if done.modified else "unchanged"


def _notes(done: StepDone) -> list[str]:
    return [] if done.result is None else [str(note) for note in done.result.notes]
