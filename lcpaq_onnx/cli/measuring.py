"""Arguments of commands that measure: how to run, and an analysis that is given, kept from earlier, or made."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lcpaq_onnx.cli import arguments
from lcpaq_onnx.errors import UsageError

if TYPE_CHECKING:
    from lcpaq_onnx.cli.console import Console
    from lcpaq_onnx.runtime.resources import Execution
    from lcpaq_onnx.tables import Measurements

__all__ = ["add_execution", "add_measurements", "analyzed", "execution", "measurements"]


# ---- declaring ------------------------------------------------------------------------------------------------------
def add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to run")
    group.add_argument(
        "--workers",
        default=arguments.DEFAULT_WORKERS,
        metavar="WHERE",
        help="where sensitivities are measured: serial, threads, threads:N, processes:N, or dask:ADDRESS of a "
        "scheduler; changes nothing but the time (default: %(default)s, one for each core)",
    )
    group.add_argument(
        "--max-memory",
        type=_memory,
        metavar="SIZE",
        help="bounds what is taken on top of the model itself: kept tensors, and the batches that run; e.g. 2GB "
        "(default: half of what is free)",
    )
    group.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="ONNX Runtime's execution provider for them, e.g. CUDAExecutionProvider; repeatable: the first that has "
        "an operator takes it (default: CPUExecutionProvider)",
    )
    cache = group.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder where measurements are kept for the next run (default: LCPAQ_CACHE, else the user's cache)",
    )
    cache.add_argument("--no-cache", action="store_true", help="neither use what was kept nor keep anything")


def add_measurements(parser: argparse.ArgumentParser) -> None:
    """An analysis, or the data to make one of."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--analysis", type=Path, metavar="A.analysis.json", help="what `lcpaq analyze` wrote")
    arguments.add_data_to(parser, either)
    arguments.add_settings(parser)
    add_execution(parser)


# ---- reading --------------------------------------------------------------------------------------------------------
def execution(args: argparse.Namespace) -> Execution:
    """Where to run and what to keep; where no cache can be, a warning and none."""
    from lcpaq_onnx.runtime.resources import Execution

    providers = tuple(args.provider or ("CPUExecutionProvider",))
    return Execution(args.workers, args.max_memory, providers, None if args.no_cache else args.cache or _user_cache())


def measurements(args: argparse.Namespace, console: Console) -> Measurements:
    """Those of ``--analysis``, or of the data. Raises LcpaqError."""
    if args.analysis is None:
        return analyzed(args, console)
    _refuse_data_options(args)
    from lcpaq_onnx.artefacts import read_measurements

    return read_measurements(args.analysis)


def analyzed(args: argparse.Namespace, console: Console) -> Measurements:
    """Measurements on the data: kept from an earlier run, or made now. Raises LcpaqError."""
    from lcpaq_onnx import compiler

    return compiler.analyze(
        args.model,
        arguments.calibration(args),
        samples=args.samples,
        settings=arguments.settings(args),
        execution=execution(args),
        progress=console.progress(),
    )


def _memory(text: str) -> int:
    from lcpaq_onnx.runtime.memory import parse_bytes

    try:
        return parse_bytes(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error.message}; {error.hint}") from error


def _user_cache() -> Path | None:
    from lcpaq_onnx.store import default_path

    try:
        return default_path().parent
    except UsageError as error:
        # A container's user has no home more often than not.
        warnings.warn(f"{error.message}: {error.hint}", stacklevel=2)
        return None


def _refuse_data_options(args: argparse.Namespace) -> None:
    """What shapes a new analysis would be lost on a finished one."""
    given = {"--samples": args.samples, "--sensitivity-samples": args.sensitivity_samples}
    given |= {"--estimator": args.estimator != "auto", "--range": args.range != "auto", "--loss": args.loss != "auto"}
    lost = [option for option, value in given.items() if value]
    if lost:
        raise UsageError(
            f"{', '.join(lost)} with --analysis, which is measured already",
            hint="give --calibration instead of --analysis, or leave it out",
        )
