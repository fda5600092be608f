"""Killing ``lcpaq analyze`` at random moments and starting it again: what was finished is not measured twice."""

from __future__ import annotations

import sqlite3
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from assets_tasks import Assets
from claims import Claim, table
from curvature_child import environment, lcpaq, run_child, write_feeds
from curvature_part import Part

import lcpaq_onnx
from lcpaq_onnx.artefacts import read_measurements
from lcpaq_onnx.store import STORE_FILE, DiskStore

__all__ = ["run_restart"]

_TASK, _IMAGES, _QUICK_IMAGES = "resnet20", 128, 32
_BUDGET = "size<=0.18x"
_SEED, _LOOK_EVERY_S = 0, 0.005


@dataclass(frozen=True)
class _Trial:
    """``repeated``: entries put although they were there. ``new``, ``lost``: keys, against an undisturbed run."""

    first: int
    second: int
    repeated: int
    new: int
    lost: int
    same_bytes: bool
    same_plan: bool


def run_restart(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """Six kills (``quick``: two), each with a store of its own, beside one analysis that runs undisturbed."""
    task = assets.task(_TASK, _QUICK_IMAGES if quick else _IMAGES, 0)
    data = write_feeds(folder / "restart.npz", task.calibration)

    def command(out: Path) -> list[str]:
        return lcpaq("analyze", task.model, "--calibration", data, "--quiet", "-o", out)

    calm = folder / "calm.analysis.json"
    run_child(command(calm), folder / "calm-store")
    expected, plan = _keys(folder / "calm-store" / STORE_FILE), _plan(task.model, calm)
    trials = []
    # Moments are counted in what is stored by then: so all of them fall amid the probing, however fast the machine is.
    for number, moment in enumerate(np.random.default_rng(_SEED).integers(1, len(expected), 2 if quick else 6)):
        out, cache = folder / f"restart-{number}.json", folder / f"restart-store-{number}"
        _kill_at(command(out), cache, int(moment))
        first = _keys(cache / STORE_FILE)
        _put_mark(cache / STORE_FILE)
        run_child(command(out), cache)
        total = _keys(cache / STORE_FILE)
        trials.append(
            _Trial(
                first=len(first),
                second=len(total - first),
                repeated=_overwritten(cache / STORE_FILE),
                new=len(total - expected),
                lost=len(expected - total),
                same_bytes=out.read_bytes() == calm.read_bytes(),
                same_plan=_plan(task.model, out) == plan,
            )
        )
    return _part(trials, len(expected))


def _part(trials: list[_Trial], entries: int) -> Part:
    header = ("stored when killed", "by the second run", "stored twice", "same analysis", "same plan")
    lines = [
        (
            str(t.first),
            str(t.second),
            str(t.repeated),
            *("yes" if same else "NO" for same in (t.same_bytes, t.same_plan)),
        )
        for t in trials
    ]
    detail = f"{len(trials)} kills of an analysis that stores {entries} entries"
    claims = [
        Claim("restart: entries measured twice", sum(t.repeated for t in trials), "<=", 0, detail),
        Claim("restart: entries too many or missing", sum(t.new + t.lost for t in trials), "<=", 0, detail),
        Claim("restart: analyses of other bytes", sum(not t.same_bytes for t in trials), "<=", 0, detail),
        Claim("restart: other plans", sum(not t.same_plan for t in trials), "<=", 0, f"{detail}; {_BUDGET}"),
    ]
    return Part(table(header, lines), {"trials": [vars(t) for t in trials], "entries": entries}, claims)


def _plan(model: Path, analysis: Path) -> list[tuple[str, str]]:
    """Layers with their formats."""
    plan = lcpaq_onnx.allocate(model, read_measurements(analysis), budget=_BUDGET)
    return [(layer.name, layer.format) for layer in plan.layers]


def _kill_at(command: list[str], cache: Path, entries: int) -> None:
    """Start ``command`` and kill it when its store has so many entries."""
    process = subprocess.Popen(command, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(_keys(cache / STORE_FILE)) < entries:
        time.sleep(_LOOK_EVERY_S)
    process.kill()
    process.wait()


# ---- inside the store's file: its tables stand in lcpaq_onnx/store/file.py -------------------------------------------
_MARK = "benchmark"


def _put_mark(store: Path) -> None:
    """A row after all that the first run wrote: one of them written again would get a number beyond it."""
    with DiskStore(store) as opened:
        opened.put(_MARK, {}, subject=_MARK, what=_MARK)


def _keys(store: Path) -> set[str]:
    if not store.exists():
        return set()
    with closing(sqlite3.connect(store)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'content'").fetchone():
            return set()  # just being made
        return {key for (key,) in connection.execute("SELECT key FROM content") if key != _MARK}


def _overwritten(store: Path) -> int:
    """A row that is replaced leaves its number and takes the next: what is missing of 1 … n was overwritten."""
    with closing(sqlite3.connect(store)) as connection:
        rows, last = connection.execute("SELECT count(*), max(rowid) FROM content").fetchone()
    return int(last - rows)
