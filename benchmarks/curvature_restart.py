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

from lcpaq_onnx.store import STORE_FILE, DiskStore

__all__ = ["run_restart"]

_TASK, _IMAGES, _QUICK_IMAGES = "resnet20", 128, 32
_SEED = 0


@dataclass(frozen=True)
class _Trial:
    """``repeated``: entries put although they were there. ``new``, ``lost``: keys, against an undisturbed run."""

    killed_after_s: float
    first: int
    second: int
    repeated: int
    new: int
    lost: int
    same_bytes: bool


def run_restart(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """Six kills (``quick``: two), each with a store of its own, beside one analysis that runs undisturbed."""
    task = assets.task(_TASK, _QUICK_IMAGES if quick else _IMAGES, 0)
    data = write_feeds(folder / "restart.npz", task.calibration)

    def command(out: Path) -> list[str]:
        return lcpaq("analyze", task.model, "--calibration", data, "--quiet", "-o", out)

    calm = folder / "calm.analysis.json"
    whole_s = run_child(command(calm), folder / "calm-store").seconds
    expected = _keys(folder / "calm-store" / STORE_FILE)
    trials = []
    for number, share in enumerate(np.random.default_rng(_SEED).uniform(0.1, 0.95, 2 if quick else 6)):
        out, cache = folder / f"restart-{number}.json", folder / f"restart-store-{number}"
        _kill_after(command(out), cache, float(share) * whole_s)
        first = _keys(cache / STORE_FILE)
        _put_mark(cache / STORE_FILE)
        run_child(command(out), cache)
        total = _keys(cache / STORE_FILE)
        trials.append(
            _Trial(
                killed_after_s=float(share) * whole_s,
                first=len(first),
                second=len(total - first),
                repeated=_overwritten(cache / STORE_FILE),
                new=len(total - expected),
                lost=len(expected - total),
                same_bytes=out.read_bytes() == calm.read_bytes(),
            )
        )
    return _part(trials, len(expected), whole_s)


def _part(trials: list[_Trial], entries: int, whole_s: float) -> Part:
    header = ("killed after s", "stored by then", "by the second run", "stored twice", "same analysis")
    lines = [
        (f"{t.killed_after_s:.2f}", str(t.first), str(t.second), str(t.repeated), "yes" if t.same_bytes else "NO")
        for t in trials
    ]
    detail = f"{len(trials)} kills of an analysis of {whole_s:.1f} s and {entries} entries"
    caught = sum(0 < t.first < entries for t in trials)
    claims = [
        Claim("restart: entries measured twice", sum(t.repeated for t in trials), "<=", 0, detail),
        Claim("restart: entries too many or missing", sum(t.new + t.lost for t in trials), "<=", 0, detail),
        Claim("restart: analyses of other bytes", sum(not t.same_bytes for t in trials), "<=", 0, detail),
        Claim("restart: kills amid the probing", caught, ">=", len(trials) / 2, "else the part shows nothing"),
    ]
    return Part(table(header, lines), {"trials": [vars(t) for t in trials], "entries": entries}, claims)


def _kill_after(command: list[str], cache: Path, seconds: float) -> None:
    process = subprocess.Popen(command, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
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
        return {key for (key,) in connection.execute("SELECT key FROM content") if key != _MARK}


def _overwritten(store: Path) -> int:
    """A row that is replaced leaves its number and takes the next: what is missing of 1 … n was overwritten."""
    with closing(sqlite3.connect(store)) as connection:
        rows, last = connection.execute("SELECT count(*), max(rowid) FROM content").fetchone()
    return int(last - rows)
