"""The labelled tasks of the assets folder: which of them classify, their models, feeds, labels and metrics."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

__all__ = ["Assets", "AssetsMissingError", "Task", "find_assets"]

Feed = dict[str, np.ndarray]

_ROW = re.compile(r"^\|\s*(?P<task>\w+)\s*\|.*\|\s*classify\s*\|\s*$", re.MULTILINE)


class AssetsMissingError(Exception):
    """There is no assets folder; the text says how to name one."""


@dataclass(frozen=True)
class Task:
    """One task. ``kind``: what its output is, "logits", "probabilities" or "other". Feeds hold one sample each; where a
    label is about several of them, these follow each other.
    """

    name: str
    model: Path
    kind: str
    calibration: list[Feed]
    evaluation: list[Feed]
    labels: list[Any]


@dataclass(frozen=True)
class Assets:
    """A folder with ``tasks.py``, ``README.md``, models and data."""

    root: Path

    @cached_property
    def _tasks(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("assets_folder_tasks", self.root / "tasks.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    def classifiers(self) -> tuple[str, ...]:
        """Tasks that the README calls "classify" and whose model is here, in its order."""
        named = _ROW.findall((self.root / "README.md").read_text(encoding="utf-8"))
        return tuple(name for name in named if (self.root / self._tasks.TASKS[name].model).is_file())

    def task(self, name: str, calibration: int, evaluation: int) -> Task:
        """``calibration`` samples and at most ``evaluation`` labels with theirs, no sample in both."""
        entry = self._tasks.TASKS[name]
        calibration_feeds = self._tasks.calibration(name, calibration)
        # Without a calibration split of its own, the first samples calibrate and must not be judged on.
        skipped = 0 if entry.calibration else len(calibration_feeds)
        feeds, labels = entry.samples(skipped + evaluation)
        each = len(feeds) // len(labels) if labels else 1
        skipped = -(-skipped // each)
        model, judged = self.root / entry.model, slice(skipped, skipped + evaluation)
        names = _input_names(model)
        return Task(
            name,
            model,
            entry.kind,
            [_renamed(feed, names) for feed in calibration_feeds],
            [_renamed(feed, names) for feed in feeds[each * skipped : each * (skipped + evaluation)]],
            labels[judged],
        )

    def top1(self, outputs: list[np.ndarray], labels: list[int]) -> float:
        """Share of correct decisions, 0 to 1; one output per sample."""
        return float(self._tasks.accuracy(outputs, labels)["top1"])

    def score(self, name: str, outputs: list[np.ndarray], labels: list[Any]) -> tuple[str, float]:
        """The task's own metric, by its name there."""
        found = self._tasks.TASKS[name].score(outputs, labels)
        metric = next(key for key in found if key != "n")
        return metric, float(found[metric])

    def compare(self, kind: str, outputs: list[np.ndarray], reference: list[np.ndarray]) -> tuple[float, float]:
        """(mean KL divergence in nats, share of equal decisions) against the float model's ``reference``; where outputs
        are no class scores (relative L2 error, NaN).
        """
        found = self._tasks.compare(kind, outputs, reference)
        if kind == "other":
            return float(found["relative_l2"]), float("nan")
        return float(found["kl"]), float(found["agreement"])


def _input_names(model: Path) -> list[str]:
    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in constants]


def _renamed(feed: Feed, names: list[str]) -> Feed:
    """As ``tasks.run`` does: by position where the names differ."""
    return feed if set(feed) == set(names) else dict(zip(names, feed.values(), strict=True))


def find_assets() -> Assets:
    """The folder that LCPAQ_ASSETS names, else ``shared/assets`` beside or in the project.

    Raises AssetsMissingError.
    """
    project = Path(__file__).resolve().parent.parent
    named = os.environ.get("LCPAQ_ASSETS")
    places = [Path(named)] if named else [project / "shared" / "assets", project.parent / "shared" / "assets"]
    for root in places:
        if (root / "tasks.py").is_file() and (root / "README.md").is_file():
            return Assets(root)
    looked = ", ".join(map(str, places))
    raise AssetsMissingError(
        f"no benchmark assets (tasks.py, README.md) in {looked}; name their folder in LCPAQ_ASSETS"
    )
