"""How long quantizing takes: ours beside ``quantize_static``, in turns in one process."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from assets_tasks import Task
from claims import Claim, table
from job_mixed import WIDTHS
from static_files import PEER, make_static

import lcpaq_onnx

__all__ = ["TimeResult", "run_time"]

_INT8_LIMIT, _ANALYSIS_LIMIT = 1.5, 12.0
_PACKAGES = ("lcpaq_onnx", "passes")
_PROFILE_SHARE, _PROFILE_LINES = 0.03, 24


@dataclass(frozen=True)
class TimeResult:
    """``seconds``: by name, one per round. ``profiles``: by name, (function, seconds with all it calls)."""

    seconds: dict[str, list[float]]
    profiles: dict[str, list[tuple[str, float]]]
    claims: list[Claim]

    def text(self) -> str:
        rows = [(name, f"{median(s):.2f}", " ".join(f"{x:.2f}" for x in s)) for name, s in self.seconds.items()]
        parts = [table(("what", "median s", "all"), rows)]
        for name, lines in self.profiles.items():
            parts.append(f"{name}: where the time goes (seconds with all that is called; profiling slows it down)")
            parts.append(table(("function", "s"), [(function, f"{s:.2f}") for function, s in lines]))
        return "\n".join(parts)


def run_time(task: Task, folder: Path, *, quick: bool) -> TimeResult:
    """Quantize the same images with each, three rounds (``quick``: two, without the analysis)."""
    batched = replace(PEER, reader_batch=16)
    runs: dict[str, Callable[[], object]] = {
        "quantize_static": lambda: make_static(task.model, task.calibration, PEER, folder / "time.onnx"),
        "quantize_static, batches of 16": lambda: make_static(
            task.model, task.calibration, batched, folder / "time.onnx"
        ),
        "lcpaq int8": lambda: _int8(task),
    }
    analysis: dict[str, Callable[[], object]] = (
        {} if quick else {"lcpaq, six widths, size<=0.18x": lambda: _mixed(task)}
    )
    for run in runs.values():
        run()  # imports and first touches
    seconds: dict[str, list[float]] = {name: [] for name in (*runs, *analysis)}
    for _ in range(2 if quick else 3):
        for name, run in (runs | analysis).items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    static, batched_static, ours = runs
    claims = [
        Claim(f"time of {name}", _ratio(seconds, name, peer), "<=", limit, f"{peer} ({PEER})")
        for peer in (static, batched_static)
        for name, limit in ((ours, _INT8_LIMIT), *((name, _ANALYSIS_LIMIT) for name in analysis))
    ]
    profiles = {name: _profile((runs | analysis)[name]) for name in (ours, *analysis)}
    return TimeResult(seconds, profiles, claims)


def _ratio(seconds: dict[str, list[float]], name: str, peer: str) -> float:
    """Median over rounds, both of one round."""
    return median(a / b for a, b in zip(seconds[name], seconds[peer], strict=True))


def _int8(task: Task) -> object:
    return lcpaq_onnx.quantize(task.model, task.calibration, weights=[8], activations=[8])


def _mixed(task: Task) -> object:
    return lcpaq_onnx.quantize(task.model, task.calibration, weights=WIDTHS, activations=[8], budget="size<=0.18x")


def _profile(run: Callable[[], object]) -> list[tuple[str, float]]:
    """The project's own functions that take at least 3 % of the time, longest first."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    entries: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    found = []
    for (file, _, function), (_, _, _, cumulative, _) in entries.items():
        path = Path(file)
        if any(part in _PACKAGES for part in path.parts) and not function.startswith("<"):
            found.append((f"{path.parent.name}/{path.stem}.{function}", cumulative))
    found.sort(key=lambda entry: -entry[1])
    longest = found[0][1] if found else 0.0
    return [entry for entry in found if entry[1] >= _PROFILE_SHARE * longest][:_PROFILE_LINES]
