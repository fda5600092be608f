"""Quantized files of one task: made by the public Python API, judged by the task's own metric on samples unseen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from assets_tasks import Assets, Feed, Task
from claims import Claim, table
from curvature_part import Part
from judging import answers, runner, take_turns

import lcpaq_onnx
from lcpaq_onnx import Execution, LcpaqError, Settings

__all__ = ["WIDTHS", "Answers", "Made", "Recipe", "Wanted", "Workshop", "claim", "joined", "run_recipes"]

WIDTHS = (2, 3, 4, 5, 6, 7, 8)

Answers = Callable[[Path], list[np.ndarray]]
"""Model file → one output for each label or feed that is judged."""


@dataclass(frozen=True)
class Recipe:
    """What to ask ``lcpaq_onnx.quantize`` for; empty and None are its defaults."""

    name: str
    budget: tuple[str, ...] = ()
    weights: tuple[int, ...] | None = None
    activations: tuple[int, ...] | None = None
    objective: lcpaq_onnx.compiler.Objective | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Made:
    """One file. ``metric`` beside the float model's; ``divergence``: KL in nats, or relative L2 error of the outputs
    where these are no class scores (``agreement`` is NaN there); ratios are to the float model, time below 1 is faster.
    """

    task: str
    recipe: str
    path: Path
    metric_name: str
    metric: float
    float_metric: float
    divergence: float
    agreement: float
    size_ratio: float
    time_ratio: float
    stored_bits: float
    executed_bits: float
    seconds: float
    failed: tuple[str, ...]

    @property
    def points_lost(self) -> float:
        """Hundredths of the metric below the float model's."""
        return 100 * (self.float_metric - self.metric)

    def row(self) -> dict[str, object]:
        """For JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("path", "task", "recipe")}


class Workshop:
    """Makes and judges files of one model. ``answer``: where running a file takes more than one run for each feed."""

    def __init__(
        self, assets: Assets, task: Task, folder: Path, *, timing_s: float, answer: Answers | None = None
    ) -> None:
        self.task = task
        self._assets, self._folder, self._timing_s = assets, folder, timing_s
        self._answer = answer or (lambda model: answers(model, task.evaluation))
        self._reference = self._answer(task.model)
        self._metric_name, self._float_metric = assets.score(task.name, self._reference, task.labels)

    def make(self, recipe: Recipe) -> Made:
        """Raises LcpaqError where there is no such file."""
        start = time.perf_counter()
        done = lcpaq_onnx.quantize(
            self.task.model,
            self.task.calibration,
            budget=recipe.budget,
            weights=recipe.weights,
            activations=recipe.activations,
            objective=recipe.objective,
            settings=recipe.settings,
            execution=Execution(cache=self._folder / "cache"),
        )
        seconds = time.perf_counter() - start
        path = self._folder / f"{self.task.name} {recipe.name}.onnx".replace(" ", "_").replace("/", "_")
        done.save(path)
        outputs = self._answer(path)
        metric = self._assets.score(self.task.name, outputs, self.task.labels)[1]
        divergence, agreement = self._assets.compare(self.task.kind, outputs, self._reference)
        report = done.report
        return Made(
            task=self.task.name,
            recipe=recipe.name,
            path=path,
            metric_name=self._metric_name,
            metric=metric,
            float_metric=self._float_metric,
            divergence=divergence,
            agreement=agreement,
            size_ratio=path.stat().st_size / self.task.model.stat().st_size,
            time_ratio=self.time_ratio(path, self.task.model),
            stored_bits=report.bits.stored if report.bits else 0.0,
            executed_bits=report.bits.executed if report.bits else 0.0,
            seconds=seconds,
            failed=tuple(f"{check.name}: {check.detail}" for check in report.failed_checks),
        )

    def time_ratio(self, model: Path, other: Path) -> float:
        """Of ``model`` to ``other``, on one sample and one thread, in turns."""
        feed: Feed = self.task.evaluation[0]
        return take_turns({"a": runner(model, feed), "b": runner(other, feed)}, self._timing_s).ratio("a", "b")


Wanted = tuple[Recipe, Callable[[Made], list[Claim]]]
"""A file to make, and what is claimed of it."""


def run_recipes(shop: Workshop, wanted: Iterable[Wanted]) -> Part:
    """A file that cannot be made is a target missed, and no reason to lose the others."""
    rows: list[Made] = []
    claims: list[Claim] = []
    for recipe, claims_of in wanted:
        label = f"{shop.task.name} {recipe.name}"
        print(label, file=sys.stderr, flush=True)
        try:
            made = shop.make(recipe)
        except LcpaqError as error:
            claims.append(Claim(f"{label}: gave a file", 0, ">=", 1, " ".join(str(error).split())))
            continue
        rows.append(made)
        claims += [*claims_of(made), claim(made, "checks that failed", len(made.failed), 0)]
    found: dict[str, object] = {f"{made.task} {made.recipe}": made.row() for made in rows}
    return Part(table(_HEADER, map(_line, rows)), found, claims)


def claim(made: Made, what: str, value: float, limit: float, detail: str = "") -> Claim:
    """At most ``limit``."""
    return Claim(f"{made.task} {made.recipe}: {what}", value, "<=", limit, detail)


def joined(parts: Iterable[Part]) -> Part:
    """As one."""
    every = list(parts)
    rows = {name: row for part in every for name, row in part.rows.items()}
    return Part("\n".join(part.text for part in every), rows, [claim for part in every for claim in part.claims])


_HEADER = ("task", "file", "metric", "float", "ours", "KL or L2", "agree", "size", "time", "bits", "s", "checks")


def _line(made: Made) -> tuple[str, ...]:
    return (
        made.task,
        made.recipe,
        made.metric_name,
        f"{made.float_metric:.4f}",
        f"{made.metric:.4f}",
        f"{made.divergence:.5f}",
        "" if np.isnan(made.agreement) else f"{100 * made.agreement:.2f} %",
        f"{made.size_ratio:.4f}",
        f"{made.time_ratio:.3f}",
        f"{made.stored_bits:.2f}/{made.executed_bits:.1f}",
        f"{made.seconds:.0f}",
        "passed" if not made.failed else "FAILED " + "; ".join(made.failed),
    )
