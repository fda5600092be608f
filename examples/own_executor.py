"""Measure on workers of your own: python examples/own_executor.py (run it in the project's root).

Any ``concurrent.futures.Executor`` will do: a pool, a cluster's queue, ``dask``'s. Jobs, functions and results can be
pickled, so they may run in other processes and on other machines. The answer is the same wherever they do.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import lcpaq_onnx


class CountingExecutor(Executor):
    """Hands every job on to another executor, and counts."""

    def __init__(self, inner: Executor) -> None:
        self.inner, self.jobs = inner, 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs += 1
        return self.inner.submit(fn, *args, **kwargs)


with ThreadPoolExecutor(2) as threads:
    workers = CountingExecutor(threads)
    measured = lcpaq_onnx.analyze(
        "models/digits_resnet.onnx",
        "models/digits_calibration.npz",
        samples=64,
        execution=lcpaq_onnx.Execution(workers=workers),
    )
worst = max(measured.errors.layers, key=lambda name: measured.errors.layers[name][4].loss)
print(f"{workers.jobs} jobs; most sensitive to 4 bits: {worst}")
