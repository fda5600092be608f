"""``lcpaq``: reads the command line, runs one command, turns errors into messages and exit codes.

Exit codes: 0 done, 1 a budget or check is not met, 2 wrong usage, 3 bad model, data, target or file, 70 a bug of lcpaq,
130 interrupted, 141 nobody reads stdout any more.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

from lcpaq_onnx.cli import cache, inspect, pareto, passes, quantize, steps, targets
from lcpaq_onnx.cli.console import Console
from lcpaq_onnx.cli.parser import Command, CommandGroup, Parser, new_parser
from lcpaq_onnx.errors import LcpaqError
from lcpaq_onnx.provenance import TOOL_VERSION

__all__ = ["main"]

_BAD_FILE = 3
_BUG = 70  # EX_SOFTWARE; Python's own 1 would read as "budget not met"
_INTERRUPTED = 130
_CLOSED_PIPE = 141

_EPILOG = """\
one command, everything:
  lcpaq quantize net.onnx --calibration data.npz --budget 'size<=0.16x' -o small.onnx

or step by step, to plan for another target or budget without measuring again:
  lcpaq analyze net.onnx --calibration data.npz -o net.analysis.json
  lcpaq plan net.onnx --analysis net.analysis.json --budget 'size<=0.16x' -o small.plan.json
  lcpaq apply net.onnx small.plan.json -o small.onnx
  lcpaq verify net.onnx small.onnx --plan small.plan.json --calibration data.npz

exit codes: 0 done, 1 budget or check not met, 2 wrong usage, 3 bad model, data, target or file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. ``argv``: without the program's name; None takes that of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Counted here too, since a malformed command line has no namespace.
    verbosity = sum(word.count("v") for word in words if word in ("-v", "-vv", "-vvv"))
    if argv is None:
        # As Ctrl-C: what is being written is cleaned up.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with warnings.catch_warnings():
        _show_warnings(verbosity)
        try:
            return _run(words)
        except (Exception, KeyboardInterrupt) as error:  # a bug must not leave with 1: that says "budget not met"
            if verbosity >= 2:
                traceback.print_exception(error)
            return _explain(error)


def build_parser() -> Parser:
    """The whole command line."""
    root = new_parser(
        "lcpaq", "A compiler from FP32 ONNX models to mixed-precision quantized ONNX models, planned by proof.", _EPILOG
    )
    root.add_argument("--version", action="version", version=f"lcpaq {TOOL_VERSION}")
    commands = CommandGroup(root)
    for module in (quantize, steps, pareto, inspect, targets, passes, cache):
        module.add_to(commands)
    return root


def _run(words: list[str]) -> int:
    try:
        args = build_parser().parse(words)
    except SystemExit as done:  # --help and --version: argparse knows no other way out
        return int(done.code or 0)
    console = Console(as_json=args.json, quiet=args.quiet, verbosity=args.verbose)
    command: Command = args.command
    code = command(args, console)
    # A closed pipe or full disk behind stdout must show here and not after the exit code is given.
    sys.stdout.flush()
    return code


def _explain(error: BaseException) -> int:
    """Says on stderr what happened; returns the exit code."""
    if isinstance(error, LcpaqError):
        _print_error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _print_error("interrupted; no file was left half-written", "")
        return _INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more at its end: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}", "check the path, its permissions and the free space")
        return _BAD_FILE
    traceback.print_exception(error)
    _print_error(f"internal error: {type(error).__name__}: {error}", "report this bug with the lines above")
    return _BUG


def _print_error(message: str, hint: str) -> None:
    print(f"lcpaq: error: {message}", file=sys.stderr)
    if hint:
        print(f"  try: {hint}", file=sys.stderr)


def _show_warnings(verbosity: int) -> None:
    """Warnings of lcpaq as one line each; those of libraries only with ``-v``."""
    warnings.simplefilter("always" if verbosity else "ignore")
    warnings.filterwarnings("always", module=r"lcpaq_onnx(\.|$)", category=UserWarning)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,
        line: str | None = None,
    ) -> None:
        print(f"lcpaq: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


if __name__ == "__main__":
    sys.exit(main())
