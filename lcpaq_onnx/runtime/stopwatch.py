"""Two models timed in one run, turn by turn: drift of the machine's speed hits both and leaves the ratio alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from lcpaq_onnx.errors import UsageError

__all__ = ["PairedTiming", "time_once_each", "time_pair"]

_LEAST_ROUNDS = 10
_MOST_ROUNDS = 2000
_WARM_UP_RUNS = 5
_MOST_LOADS = 5


@dataclass(frozen=True)
class PairedTiming:
    """Times of two callables in microseconds. ``ratio``: median over rounds of second / first, both of one round, so it
    is not the quotient of the medians; ``ratio_low`` and ``ratio_high``: its quartiles.
    """

    rounds: int
    first_median_us: float
    first_minimum_us: float
    second_median_us: float
    second_minimum_us: float
    ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def speedup(self) -> float:
        """How many times faster the second is; above 1 it is faster."""
        return 1 / self.ratio


def time_pair(first: Callable[[], object], second: Callable[[], object], budget_s: float) -> PairedTiming:
    """Run both in turns (first second, second first, …) for about ``budget_s`` seconds after warming up.

    At least 3 rounds are run whatever they cost, and not more than 2,000. Raises UsageError on a budget that is not
    positive.
    """
    if not budget_s > 0:
        raise UsageError(f"timing for {budget_s} seconds", hint="use a positive number of seconds, e.g. 1")
    _warm_up(first, budget_s / 10)
    _warm_up(second, budget_s / 10)
    times: list[tuple[float, float]] = []
    deadline = time.perf_counter() + budget_s
    while len(times) < _LEAST_ROUNDS or (time.perf_counter() < deadline and len(times) < _MOST_ROUNDS):
        if len(times) % 2:
            late = _seconds(second)
            times.append((_seconds(first), late))
        else:
            early = _seconds(first)
            times.append((early, _seconds(second)))
    ratios = sorted(b / a for a, b in times)
    firsts, seconds = zip(*times, strict=True)
    return PairedTiming(
        rounds=len(times),
        first_median_us=median(firsts) * 1e6,
        first_minimum_us=min(firsts) * 1e6,
        second_median_us=median(seconds) * 1e6,
        second_minimum_us=min(seconds) * 1e6,
        ratio=median(ratios),
        ratio_low=ratios[len(ratios) // 4],
        ratio_high=ratios[-1 - len(ratios) // 4],
    )


def time_once_each(first: Callable[[], object], second: Callable[[], object], budget_s: float) -> tuple[float, float]:
    """Least time of each in milliseconds: for what takes long, such as loading. Run in turns, once without counting
    and then for ``budget_s`` seconds, at least once and not more than five times.
    """
    first()
    second()
    times: list[tuple[float, float]] = []
    deadline = time.perf_counter() + budget_s
    while not times or (time.perf_counter() < deadline and len(times) < _MOST_LOADS):
        times.append((_seconds(first), _seconds(second)))
    firsts, seconds = zip(*times, strict=True)
    return min(firsts) * 1e3, min(seconds) * 1e3


def _warm_up(run: Callable[[], object], budget_s: float) -> None:
    """First runs allocate memory and fill caches; one is enough for a model that takes long."""
    deadline = time.perf_counter() + budget_s
    for _ in range(_WARM_UP_RUNS):
        run()
        if time.perf_counter() > deadline:
            return


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
