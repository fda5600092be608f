"""``lcpaq targets``: which hardware there is, and is a descriptor right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.cli import arguments
from lcpaq_onnx.cli.console import Console, text_table
from lcpaq_onnx.cli.parser import CommandGroup

if TYPE_CHECKING:
    from lcpaq_onnx.formats import LayerFormat
    from lcpaq_onnx.targets.target import Target

__all__ = ["add_to"]

_EPILOG = """\
examples:
  lcpaq targets list
  lcpaq targets show onnxruntime-cpu-x86_64-vnni
  lcpaq targets validate my-board.toml
"""


def add_to(commands: CommandGroup) -> None:
    group = CommandGroup(commands.add("targets", "list, show and check hardware targets", _EPILOG))

    parser = group.add("list", "name the built-in targets", "example:\n  lcpaq targets list --json\n", command=_list)
    arguments.add_printing(parser, "names and descriptions")

    parser = group.add(
        "show", "show what a target takes and executes", "example:\n  lcpaq targets show generic-int8\n", command=_show
    )
    parser.add_argument("target", metavar="NAME", help="a built-in target, or the path of a .toml file")
    arguments.add_printing(parser, "the whole descriptor, inherited keys filled in,")

    parser = group.add(
        "validate", "check a target descriptor", "example:\n  lcpaq targets validate my-board.toml\n", command=_validate
    )
    parser.add_argument("target", metavar="FILE", help="a .toml file; docs/targets.md says how to write one")
    arguments.add_printing(parser, "name and number of table rows")


def _list(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx.targets.loader import available, load

    found = [load(name) for name in available()]
    document = [{"name": target.name, "description": target.description} for target in found]
    console.result(text_table(["target", "description"], [[t.name, t.description] for t in found]), document)
    return 0


def _show(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx.targets.loader import load

    target = load(args.target)
    console.result(_target_text(target), target.model_dump(mode="json", by_alias=True))
    return 0


def _validate(args: argparse.Namespace, console: Console) -> int:
    from lcpaq_onnx.targets.loader import load

    # As a path: the name of a built-in target is not a file to check.
    target = load(Path(args.target))
    # The table is read when it is first asked for: a check must ask.
    rows = len(target.table.rows)
    document = {"name": target.name, "valid": True, "table_rows": rows}
    console.result(f"{args.target}: valid target '{target.name}', latency table of {rows} rows", document)
    return 0


def _target_text(target: Target) -> str:
    rows = []
    for op in sorted(target.operators):
        formats = target.layer_formats(op)[1:]
        integer = ", ".join(f"a{bits}" for bits in target.operators[op].integer)
        rows.append([op, " ".join(map(str, formats)) or "-", _executed(target, op, formats), integer or "-"])
    storage = [
        [",".join(map(str, rule.bits)), rule.expression, str(rule.min_opset), str(rule.min_ir)]
        for rule in target.storage
    ]
    runtime = target.runtime
    weights = target.weights
    stored, integer_bits = (",".join(map(str, bits)) for bits in (weights.stored_bits, weights.integer_bits))
    lines = [
        f"{target.name}: {target.description}",
        f"  runtime: {runtime.name}, {runtime.threads} threads",
        f"  formats: opset up to {runtime.opset_max}, IR version up to {runtime.ir_max}",
        f"  weights: {stored} bits stored, {integer_bits} bits on integer kernels",
        f"  activations: {', '.join(f'{bits}: {fmt}' for bits, fmt in target.activations.items())}",
        f"  latency table: {len(target.table.rows)} rows; other nodes by roofline",
        *(f"  source: {source}" for source in target.sources),
        "",
        text_table(["operator", "layer formats", "executes", "integer between Q/DQ"], rows),
        text_table(["stored bits", "as", "from opset", "from IR"], storage),
    ]
    return "\n".join(lines)


def _executed(target: Target, op: str, formats: tuple[LayerFormat, ...]) -> str:
    return ", ".join(sorted({target.executed(op, layer_format) for layer_format in formats})) or "-"
