"""Whole processes: how long they take, start-up included, and how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from assets_tasks import Feed
from judging import batch_of

__all__ = ["ChildError", "ChildRun", "lcpaq", "run_child", "write_feeds"]

# A small process starts the command: Linux counts the memory of the one that forks into the peak of its child.
_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds = time.perf_counter() - start
kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([code, seconds, kilobytes]))
"""
_BYTES = 1 if sys.platform == "darwin" else 1024


class ChildError(Exception):
    """A command failed; the text holds what it said last."""


@dataclass(frozen=True)
class ChildRun:
    """``peak_bytes``: the largest resident set of any one process of it."""

    seconds: float
    peak_bytes: int


def lcpaq(*words: str | Path) -> list[str]:
    """The command line of this environment."""
    return [sys.executable, "-m", "lcpaq_onnx", *map(str, words)]


def run_child(command: Sequence[str], cache: Path) -> ChildRun:
    """Run to the end with ``cache`` as the folder of the store. Raises ChildError unless it leaves with 0."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, *command],
        env=environment(cache),
        capture_output=True,
        text=True,
        check=False,
    )
    code, seconds, size = json.loads(done.stdout) if done.returncode == 0 else (done.returncode, 0.0, 0)
    if code:
        raise ChildError(f"{' '.join(command[:6])} … left with {code}: {done.stderr.strip()[-500:]}")
    return ChildRun(seconds, size * _BYTES)


def environment(cache: Path) -> Mapping[str, str]:
    return os.environ | {"LCPAQ_CACHE": str(cache)}


def write_feeds(path: Path, feeds: list[Feed]) -> Path:
    """Calibration data as a file."""
    np.savez(path, **batch_of(feeds))  # type: ignore[arg-type]  # numpy's stub takes the names for allow_pickle
    return path
