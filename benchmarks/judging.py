"""Judging model files whoever made them: accuracy against labels and the float model, and times taken in turns."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
from assets_tasks import Assets, Feed, Task

__all__ = ["Judge", "Judgement", "Run", "Times", "batch_of", "kernel_counts", "open_model", "runner", "take_turns"]

Run = Callable[[], object]

_STACK = 100
_WARM_UP_RUNS = 5
_FRESH_SESSIONS = 3
_LEAST_ROUNDS = 2
_ORT_FATAL = 4


@dataclass(frozen=True)
class Judgement:
    """``kl`` in nats, ``sqnr_db`` of the raw output, both against the float model; shares from 0 to 1."""

    top1: float
    agreement: float
    kl: float
    sqnr_db: float


@dataclass(frozen=True)
class Times:
    """Seconds of each name: for each set of sessions, one per round; all names of one round ran after each other."""

    seconds: Mapping[str, list[list[float]]]

    def median_us(self, name: str) -> float:
        return median(value for session in self.seconds[name] for value in session) * 1e6

    def ratio(self, first: str, second: str) -> float:
        """Median over rounds of first / second: below 1, the first is faster. Drift of the machine hits both."""
        return median(ratio for session in self._ratios(first, second) for ratio in session)

    def range_of_ratio(self, first: str, second: str) -> tuple[float, float]:
        """Least and largest median of one set of sessions: a difference inside it is not resolved."""
        medians = [median(session) for session in self._ratios(first, second)]
        return min(medians), max(medians)

    def _ratios(self, first: str, second: str) -> list[list[float]]:
        pairs = zip(self.seconds[first], self.seconds[second], strict=True)
        return [[a / b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in pairs]


class Judge:
    """Judges files of one task; the float model's answers are computed once."""

    def __init__(self, assets: Assets, task: Task) -> None:
        self._assets = assets
        self._task = task
        self._reference = answers(task.model, task.evaluation)
        self.reference_top1 = assets.top1(self._reference, task.labels)

    def judge(self, model: Path) -> Judgement:
        outputs = answers(model, self._task.evaluation)
        kl, agreement = self._assets.compare(self._task.kind, outputs, self._reference)
        top1 = self._assets.top1(outputs, self._task.labels)
        return Judgement(top1=top1, agreement=agreement, kl=kl, sqnr_db=_sqnr_db(outputs, self._reference))


def open_model(model: Path) -> ort.InferenceSession:
    """A session with one thread and all optimisations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = _ORT_FATAL
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def answers(model: Path, feeds: list[Feed]) -> list[np.ndarray]:
    """First output for each feed. Feeds are stacked where the model gives the same for two together as for each."""
    session = open_model(model)
    if not _stacks(session, feeds):
        return [session.run(None, feed)[0] for feed in feeds]
    outputs: list[np.ndarray] = []
    for start in range(0, len(feeds), _STACK):
        stacked = session.run(None, batch_of(feeds[start : start + _STACK]))[0]
        outputs += np.split(stacked, len(stacked))
    return outputs


def batch_of(feeds: list[Feed]) -> Feed:
    """The feeds joined along axis 0."""
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def runner(model: Path, feed: Feed) -> Callable[[], Run]:
    """Makes a callable that runs ``model`` once on ``feed``, in a session of its own."""

    def make() -> Run:
        session = open_model(model)
        return lambda: session.run(None, feed)

    return make


def take_turns(makers: Mapping[str, Callable[[], Run]], seconds: float) -> Times:
    """Run all in turns for about ``seconds``, each round in another order: what runs just before leaves its traces in
    the caches. ``makers`` are called three times: where a session's memory happens to lie is worth a per cent or so.
    """
    names, rng = list(makers), np.random.default_rng(0)
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(_FRESH_SESSIONS):
        runs = {name: make() for name, make in makers.items()}
        for rows in found.values():
            rows.append([])
        for run in (*runs.values(),) * _WARM_UP_RUNS:
            run()
        deadline, rounds = time.perf_counter() + seconds / _FRESH_SESSIONS, 0
        while rounds < _LEAST_ROUNDS or time.perf_counter() < deadline:
            for name in rng.permutation(names):
                start = time.perf_counter()
                runs[name]()
                found[name][-1].append(time.perf_counter() - start)
            rounds += 1
    return Times(found)


def kernel_counts(model: Path) -> dict[str, int]:
    """Operators of the graph that ONNX Runtime runs after optimising, most frequent first."""
    with tempfile.TemporaryDirectory(prefix="lcpaq-bench-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = _ORT_FATAL
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return dict(Counter(node.op_type for node in nodes).most_common())


def _stacks(session: ort.InferenceSession, feeds: list[Feed]) -> bool:
    """Whether the batch axis is declared free, two samples fit together, and answers stay the same."""
    if len(feeds) < 2 or any(i.shape and isinstance(i.shape[0], int) for i in session.get_inputs()):
        return False
    if len({tuple(value.shape for value in feed.values()) for feed in feeds}) > 1:
        return False
    single = np.concatenate([session.run(None, feed)[0] for feed in feeds[:2]])
    try:
        pair = session.run(None, batch_of(feeds[:2]))[0]
    except (RuntimeError, ValueError):
        return False
    return pair.shape == single.shape and bool(np.allclose(pair, single, rtol=1e-3, atol=1e-3))


def _sqnr_db(outputs: list[np.ndarray], reference: list[np.ndarray]) -> float:
    signal = sum(float((r.astype(np.float64) ** 2).sum()) for r in reference)
    noise = sum(float(((o.astype(np.float64) - r) ** 2).sum()) for o, r in zip(outputs, reference, strict=True))
    return float(10 * np.log10(signal / max(noise, 1e-300)))
