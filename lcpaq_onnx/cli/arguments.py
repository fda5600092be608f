"""Arguments that several commands share, and what they become."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.budget import parse_budgets
from lcpaq_onnx.errors import UsageError

if TYPE_CHECKING:
    from lcpaq_onnx.planning.bench import Settings
    from lcpaq_onnx.runtime.calibration import Source

__all__ = [
    "DATA_HELP",
    "DEFAULT_TARGET",
    "DEFAULT_WORKERS",
    "ESTIMATORS",
    "LOSSES",
    "MIGRATIONS",
    "OBJECTIVES",
    "RANGE_METHODS",
    "ROUNDINGS",
    "add_budgets",
    "add_data",
    "add_data_to",
    "add_migration",
    "add_model",
    "add_output",
    "add_printing",
    "add_settings",
    "add_target",
    "budgets",
    "calibration",
    "count",
    "refuse_same_file",
    "settings",
]

# Spelled out here so that `--help` need not import numpy; a test compares them with the types they stand for.
OBJECTIVES = ("error", "latency", "size")
RANGE_METHODS = ("auto", "mse", "minmax", "percentile", "entropy")
LOSSES = ("auto", "kl-logits", "kl-probabilities", "squared-error")
ROUNDINGS = ("auto", "nearest", "compensated")
MIGRATIONS = ("auto", "never", "always")
ESTIMATORS = ("auto", "hessian-diagonal", "rounding-error")
DEFAULT_WORKERS = "threads"
DEFAULT_TARGET = "onnxruntime-cpu-x86_64-vnni"

DATA_HELP = """\
DATA is a .npz file (arrays named as the model's inputs, axis 0 counts samples), a folder of .npz files (one complete
feed each) or of .npy files, a folder of ONNX test_data_set_* folders, or a folder of images with preprocess.toml."""


# ---- declaring ------------------------------------------------------------------------------------------------------
def add_model(parser: argparse.ArgumentParser, *, metavar: str = "MODEL.onnx") -> None:
    parser.add_argument("model", type=Path, metavar=metavar, help="the float model; never changed")


def add_output(parser: argparse.ArgumentParser, metavar: str, what: str, *, required: bool = True) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar=metavar, required=required, help=what)


def add_printing(parser: argparse.ArgumentParser, json_help: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {json_help} as JSON on stdout, and nothing else")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors (and JSON, if asked for)")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="say more on stderr; -vv: errors with their traceback"
    )


def add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    add_data_to(parser, parser.add_mutually_exclusive_group(required=required))


def add_data_to(parser: argparse.ArgumentParser, either: argparse._ActionsContainer) -> None:
    """To the alternatives ``either``, of which one is given, and what goes with them to ``parser``."""
    either.add_argument("--calibration", metavar="DATA", help="real inputs of the model, see below")
    either.add_argument(
        "--random-data", type=count, metavar="N", help="N random samples instead: for trying out, accuracy will suffer"
    )
    parser.add_argument("--samples", type=count, metavar="N", help="use the first N samples (default: all)")


def add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to measure")
    group.add_argument(
        "--estimator",
        choices=ESTIMATORS,
        default="auto",
        help="where the error of a stored width comes from (default: %(default)s). auto: from curvature, and measured "
        "where the plan depends on it. hessian-diagonal: from curvature alone; fewest runs of the model, for widths of "
        "5 bits and more. rounding-error: every layer measured at every width; most runs, for 2 and 3 bits, or where "
        "the report says that predicted and measured errors rank differently",
    )
    group.add_argument(
        "--sensitivity-samples",
        type=count,
        metavar="N",
        help="samples that sensitivities are measured on (default: 16 to 128, until they rank reliably)",
    )
    group.add_argument(
        "--range",
        choices=RANGE_METHODS,
        default="auto",
        help="how the range of an activation is chosen (default: %(default)s). auto: by mse, or minmax or percentile "
        "where the output's error, measured, is clearly lower",
    )
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="auto",
        help="how weights become integers (default: %(default)s). nearest: each for itself. compensated: so that their "
        "errors make up for each other on the data. auto: compensated where the measured error is clearly lower",
    )
    group.add_argument(
        "--loss", choices=LOSSES, default="auto", help="what counts as error (default: by the kind of outputs)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers (default: %(default)s)")


def add_migration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--migration",
        choices=MIGRATIONS,
        default="auto",
        help="whether models with attention are rewritten first, so that range moves from activations to the weights "
        "that multiply them (default: %(default)s). auto: where 8-bit activations cost error, and the outcome, "
        "measured, is better",
    )


def add_target(parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_TARGET) -> None:
    shown = "" if default is None else " (default: %(default)s)"
    parser.add_argument(
        "--target",
        default=default,
        metavar="NAME",
        help=f"hardware: a name from `lcpaq targets list` or a .toml file{shown}",
    )


def add_budgets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="LIMIT",
        help="repeatable: 'size<=0.16x', 'size<=640KB', 'latency<=0.6x', 'bops<=0.1x', 'peak_memory<=512KB', "
        "'bits<=4' (mean stored width of the weights), 'error<=1%%'",
    )
    parser.add_argument(
        "--weights", type=_widths, metavar="BITS", help="weight widths that may be used, e.g. 2,3,4,5,6,8"
    )
    parser.add_argument(
        "--activations", type=_widths, metavar="BITS", help="activation widths that may be used, e.g. 8,32 (32: float)"
    )


# ---- reading --------------------------------------------------------------------------------------------------------
def budgets(args: argparse.Namespace) -> tuple[str, ...]:
    """The budgets as texts, checked before any work. Raises UsageError."""
    return tuple(str(budget) for budget in parse_budgets(args.budget))


def settings(args: argparse.Namespace) -> Settings:
    from lcpaq_onnx.planning.bench import Settings

    return Settings(
        loss=args.loss,
        range_method=args.range,
        estimator=args.estimator,
        sensitivity_samples=args.sensitivity_samples,
        seed=args.seed,
        rounding=args.rounding,
    )


def calibration(args: argparse.Namespace) -> Source:
    """The data that ``--calibration`` or ``--random-data`` stand for. Random data come with a warning."""
    if args.random_data is None:
        path: str = args.calibration
        return path
    from lcpaq_onnx.graph import graph_io
    from lcpaq_onnx.runtime.calibration import random_data
    from lcpaq_onnx.runtime.declared import declared_inputs

    return random_data(declared_inputs(graph_io.load(args.model)), args.random_data, args.seed)


def refuse_same_file(outputs: tuple[Path, ...], inputs: tuple[Path | str | None, ...]) -> None:
    """Raises UsageError when an output would overwrite an input."""
    for output in outputs:
        for source in inputs:
            if source is not None and _same_file(output, Path(source)):
                raise UsageError(f"the output {output} is the input {source}", hint="choose another path after -o")


def _same_file(output: Path, source: Path) -> bool:
    if output.exists() and source.exists():
        return os.path.samefile(output, source)
    return output.absolute() == source.absolute()


def count(text: str) -> int:
    """A whole number of 1 or more, as a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


def _widths(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of widths; write e.g. 4,8")
    return tuple(int(part) for part in parts)
