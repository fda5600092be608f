"""The engine beside the naive way: one session whose weights are all inputs, a whole forward for each layer × width."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
from assets_tasks import Assets, Feed
from claims import Claim, table
from curvature_engine import Subject, calibrated, opened
from curvature_part import Part
from judging import batch_of

from lcpaq_onnx.numeric.losses import TeacherLoss
from lcpaq_onnx.passes import teacher_of
from lcpaq_onnx.passes.analysis.rounding_errors import RoundingErrors
from lcpaq_onnx.runtime.resources import Execution

__all__ = ["run_naive"]

Losses = dict[tuple[str, int], float]

_WIDTHS = (2, 3, 4, 5, 6, 8)
_SAME = 1e-3
_ORT_FATAL = 4


@dataclass(frozen=True)
class _Case:
    """``limit``: the engine's time over the naive way's. ``batches``: sizes of batch that the naive way is given."""

    task: str
    limit: float
    samples: int
    batches: tuple[int, ...] = (1, 32)


_CASES = (_Case("resnet20", 0.30, 64), _Case("mobilenetv2_160_coarse10", 0.15, 32))
_QUICK_CASES = (_Case("resnet20", 0.30, 32), _Case("mobilenetv2_160_coarse10", 0.15, 4))


def run_naive(assets: Assets, *, quick: bool) -> Part:
    """Three rounds (``quick``: one, on fewer samples). What calibration finds (loss, shapes) is given to both ways and
    in neither time; all else is, the engine's sessions and the naive way's one too.
    """
    rows: dict[str, object] = {}
    lines, claims = list[tuple[str, ...]](), list[Claim]()
    for case in _QUICK_CASES if quick else _CASES:
        found = _measured(assets, case, rounds=1 if quick else 3)
        rows[case.task] = found.row()
        lines += found.lines()
        claims += found.claims()
    header = ("model", "layers x widths", "samples", "way", "median s", "engine / naive", "all s")
    return Part(table(header, lines), rows, claims)


@dataclass(frozen=True)
class _Found:
    case: _Case
    entries: int
    engine_s: list[float]
    naive_s: dict[int, list[float]]
    difference: float
    floor: float

    def ratio(self, batch: int) -> float:
        """Median over rounds, both of one round."""
        return median(a / b for a, b in zip(self.engine_s, self.naive_s[batch], strict=True))

    def row(self) -> dict[str, object]:
        return {
            "entries": self.entries,
            "samples": self.case.samples,
            "engine_s": self.engine_s,
            "naive_s_by_batch": self.naive_s,
            "largest_relative_difference_beyond_float32": self.difference,
            "float32_floor_loss": self.floor,
        }

    def lines(self) -> Iterator[tuple[str, ...]]:
        start = (self.case.task, str(self.entries), str(self.case.samples))
        yield (*start, "engine", f"{median(self.engine_s):.2f}", "", _all(self.engine_s))
        for batch, seconds in self.naive_s.items():
            way = f"naive, batches of {batch}"
            yield (*start, way, f"{median(seconds):.2f}", f"{self.ratio(batch):.3f}", _all(seconds))

    def claims(self) -> Iterator[Claim]:
        for batch in self.naive_s:
            detail = f"naive way in batches of {batch}, {self.entries} entries, {self.case.samples} samples"
            yield Claim(f"{self.case.task}: time of the engine", self.ratio(batch), "<=", self.case.limit, detail)
        detail = f"naive table: largest relative difference beyond float32's own (loss {self.floor:.1e} of no change)"
        yield Claim(f"{self.case.task}: the same table", self.difference, "<=", _SAME, detail)


def _measured(assets: Assets, case: _Case, rounds: int) -> _Found:
    task = assets.task(case.task, case.samples, 0)
    subject = Subject.of(task.model, task.calibration)
    entries = subject.entries(_WIDTHS)
    engine_s, naive_s = list[float](), {batch: list[float]() for batch in case.batches}
    with opened(subject.graph, task.calibration, Execution()) as analyses:
        teacher = teacher_of(analyses)
        for _ in range(rounds):
            start = time.perf_counter()
            with calibrated(analyses, Execution()) as fresh:
                found = fresh.get(RoundingErrors(entries, case.samples))
            engine_s.append(time.perf_counter() - start)
            for batch in case.batches:
                start = time.perf_counter()
                naive = _NaiveWay(subject, task.calibration, batch, teacher.loss)
                expected = naive.losses(_WIDTHS)
                naive_s[batch].append(time.perf_counter() - start)
        floor = naive.loss_of_no_change()
    difference = max(_beyond(found[entry].loss, expected[entry], floor) for entry in entries)
    return _Found(case, len(entries), engine_s, naive_s, difference, floor)


class _NaiveWay:
    """What a user writes who has a session and a loop. Both cores: ONNX Runtime's default threads."""

    def __init__(self, subject: Subject, feeds: list[Feed], batch: int, loss: TeacherLoss) -> None:
        self._subject, self._loss = subject, loss
        self._session = _session(_with_inputs(subject.proto, subject.weights))
        self._names = [value.name for value in self._session.get_outputs()]
        self._batches = [batch_of(feeds[at : at + batch]) for at in range(0, len(feeds), batch)]
        self._answers = [self._run(feed, {}) for feed in self._batches]

    def losses(self, widths: tuple[int, ...]) -> Losses:
        """Mean loss of each layer at each of ``widths``."""
        found = {}
        for layer in self._subject.layers:
            for bits in widths:
                changed = {layer.weight: self._subject.rounded(layer, bits)}
                losses = [
                    self._loss(answer, self._run(feed, changed))
                    for feed, answer in zip(self._batches, self._answers, strict=True)
                ]
                found[layer.name, bits] = float(np.concatenate(losses).mean())
        return found

    def loss_of_no_change(self) -> float:
        """What the loss makes of float32 sums in another order: this session against one with constant weights."""
        constant = _session(self._subject.proto)
        losses = [
            self._loss(answer, dict(zip(self._names, constant.run(None, feed), strict=True)))
            for feed, answer in zip(self._batches, self._answers, strict=True)
        ]
        return float(np.concatenate(losses).mean())

    def _run(self, feed: Feed, changed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._session.run(None, feed | self._subject.weights | dict(changed))
        return dict(zip(self._names, outputs, strict=True))


def _beyond(found: float, expected: float, floor: float) -> float:
    """Relative difference of two losses less what float32 explains: losses are squares of output changes, so an output
    off by √floor moves a loss L by up to 2√(L·floor) + floor.
    """
    explained = 2 * math.sqrt(expected * floor) + floor
    return max(0.0, abs(found - expected) - explained) / max(expected, 1e-300)


def _with_inputs(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """``model`` with these initializers turned into inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [tensor for tensor in copy.graph.initializer if tensor.name not in weights]
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            copy.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _ORT_FATAL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _all(seconds: list[float]) -> str:
    return " ".join(f"{s:.2f}" for s in seconds)
