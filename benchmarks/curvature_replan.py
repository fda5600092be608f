"""Planning again from what was measured: whole processes, for other budgets than before."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from assets_tasks import Assets, Task
from claims import Claim, table
from curvature_child import lcpaq, run_child, write_feeds
from curvature_part import Part

from lcpaq_onnx.store import STORE_FILE, DiskStore

__all__ = ["run_replan"]

_TASKS = ("mobilenetv2_160_coarse10", "resnet50thin_coarse10")
_IMAGES, _QUICK_IMAGES = 32, 8
_BUDGETS = ("size<=0.2x", "size<=0.15x", "size<=0.25x", "size<=0.3x", "size<=0.18x")
_LIMIT_S = 1.0


def run_replan(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """One analysis of each model (``quick``: of the first), then every budget from its file and from the store."""
    lines, rows, claims = [], dict[str, object](), list[Claim]()
    for name in _TASKS[:1] if quick else _TASKS:
        seconds = _measured(assets.task(name, _QUICK_IMAGES if quick else _IMAGES, 0), folder)
        rows[name] = seconds
        for way in ("--analysis", "--calibration"):
            value = median(seconds[way])
            lines.append((name, way, f"{value:.2f}", " ".join(f"{s:.2f}" for s in seconds[way])))
            detail = f"whole process, median over {len(_BUDGETS)} budgets"
            claims.append(Claim(f"{name}: seconds of lcpaq plan {way}", value, "<=", _LIMIT_S, detail))
        lines.append((name, "(analyze)", f"{seconds['analyze'][0]:.2f}", ""))
        grown = int(seconds["measured while planning"][0])
        claims.append(Claim(f"{name}: measured while planning from the store", grown, "<=", 0, "entries in the store"))
    return Part(table(("model", "lcpaq plan", "median s", "all"), lines), rows, claims)


def _measured(task: Task, folder: Path) -> dict[str, list[float]]:
    data = write_feeds(folder / f"{task.name}.npz", task.calibration)
    analysis, cache = folder / f"{task.name}.analysis.json", folder / f"{task.name}-store"
    analyze = lcpaq("analyze", task.model, "--calibration", data, "--quiet", "-o", analysis)
    seconds = {"analyze": [run_child(analyze, cache).seconds]}
    before = _entries(cache)
    for way, source in (("--analysis", analysis), ("--calibration", data)):
        seconds[way] = []
        for budget in _BUDGETS:
            out = folder / f"{task.name}.plan.json"
            plan = lcpaq("plan", task.model, way, source, "--budget", budget, "--quiet", "-o", out)
            seconds[way].append(run_child(plan, cache).seconds)
    seconds["measured while planning"] = [_entries(cache) - before]
    return seconds


def _entries(cache: Path) -> int:
    with DiskStore(cache / STORE_FILE) as store:
        return sum(holding.entries for holding in store.contents())
