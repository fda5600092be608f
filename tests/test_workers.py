"""Workers: the same figures wherever probes run, errors that arrive, nothing left waiting."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import distributed
import numpy as np
import pytest
from analysing import refusing_loss
from planning_case import CALIBRATION, MODELS, prepared

from lcpaq_onnx.errors import ModelError, UsageError
from lcpaq_onnx.manager.analysis import AnalysisInputs, AnalysisManager
from lcpaq_onnx.passes import ErrorTables
from lcpaq_onnx.passes.analysis.rounding_errors import every_entry
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.resources import Execution, Resources
from lcpaq_onnx.runtime.session import Session
from lcpaq_onnx.runtime.workers import SERIAL, Workers, open_workers
from lcpaq_onnx.tables import ErrorTable

SAMPLES = 8


@functools.cache
def inputs() -> AnalysisInputs:
    data = open_calibration(CALIBRATION, Session(MODELS["digits_resnet"]).inputs, samples=32)
    return AnalysisInputs(calibration=data)


def table_of(resources: Resources, **changes: Any) -> ErrorTable:
    """Second order, channels, rounding errors and activations: probes of every kind."""
    analyses = AnalysisManager(prepared(), replace(inputs(), resources=resources, **changes))
    return analyses.get(ErrorTables(every_entry(analyses, (2, 4)), SAMPLES, 1, 1))


@functools.cache
def serial_table() -> ErrorTable:
    return table_of(Resources())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as running:
        yield running


# ---- the same figures -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", ["serial", "threads", "threads:3", "processes:2"])
def test_error_tables_are_the_same_to_the_bit(workers: str) -> None:
    with Execution(workers=workers, cache=None).resources() as resources:
        assert table_of(resources) == serial_table()
    assert len(serial_table().layers) > 8


def test_error_tables_are_the_same_to_the_bit_on_a_dask_cluster(cluster: Any) -> None:
    with Execution(workers=f"dask:{cluster.scheduler_address}").resources() as resources:
        assert resources.workers.count == 2
        assert table_of(resources) == serial_table()


def test_a_dask_client_gives_an_executor_that_stays_open(cluster: Any) -> None:
    with distributed.Client(cluster) as client:
        executor = client.get_executor()
        with Execution(workers=executor).resources() as resources:
            assert table_of(resources) == serial_table()
        assert executor.submit(math.sqrt, 9.0).result() == 3.0


def test_a_callers_own_executor_stays_open() -> None:
    with ThreadPoolExecutor(2) as executor:
        with open_workers(executor) as workers:
            assert [result for _, result in workers.each(math.sqrt, [4.0, 9.0])] == [2.0, 3.0]
        assert executor.submit(math.sqrt, 16.0).result() == 4.0


# ---- order and laziness ---------------------------------------------------------------------------------------------
def slow_first(number: int) -> int:
    time.sleep(0.2 if number == 0 else 0.0)
    return number * number


@pytest.mark.parametrize("workers", ["serial", "threads:3"])
def test_results_come_in_the_order_of_the_jobs(workers: str) -> None:
    with open_workers(workers) as opened:
        assert list(opened.each(slow_first, range(9))) == [(number, number * number) for number in range(9)]


@pytest.mark.parametrize(("workers", "ahead"), [("serial", 1), ("threads:2", 3)])
def test_jobs_are_made_as_they_are_needed(workers: str, ahead: int) -> None:
    made: list[int] = []

    def jobs() -> Iterator[float]:
        for number in range(50):
            made.append(number)
            yield float(number)

    with open_workers(workers) as opened:
        for done, _ in enumerate(opened.each(math.sqrt, jobs()), start=1):
            # What runs, and one ready for whoever is free next.
            assert len(made) <= done + ahead - 1


# ---- errors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", ["serial", "threads:2", "processes:2"])
def test_a_job_that_fails_gives_its_own_error(workers: str) -> None:
    with (
        Execution(workers=workers).resources() as resources,
        pytest.raises(ModelError, match="make no sense\n  try: give others"),
    ):
        table_of(resources, loss=refusing_loss)


def test_a_job_that_fails_on_a_dask_worker_gives_its_own_error(cluster: Any) -> None:
    with open_workers(f"dask:{cluster.scheduler_address}") as workers:
        with pytest.raises(ValueError, match=r"math domain|nonnegative"):
            list(workers.each(math.sqrt, [4.0, -1.0, 9.0]))
        assert [result for _, result in workers.each(math.sqrt, [16.0])] == [4.0]


def test_a_loss_that_cannot_be_sent_says_where_to_define_it() -> None:
    with (
        Execution(workers="processes:2").resources() as resources,
        pytest.raises(UsageError, match=r"cannot be sent(.|\n)*define a loss of your own at the top of a module"),
    ):
        table_of(resources, loss=lambda teacher, changed: np.zeros(SAMPLES))


def test_a_process_that_dies_is_no_riddle() -> None:
    with (
        pytest.raises(UsageError, match=r"a worker ended before its job was done(.|\n)*allow less memory"),
        open_workers("processes:2") as workers,
    ):
        list(workers.each(os._exit, [3]))


# ---- interruptions --------------------------------------------------------------------------------------------------
class Recording(ThreadPoolExecutor):
    """Keeps what was submitted."""

    def __init__(self) -> None:
        super().__init__(1)
        self.submitted: list[Future[Any]] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted.append(super().submit(function, *args, **kwargs))
        return self.submitted[-1]


def assert_nothing_waits(executor: Recording) -> None:
    assert len(executor.submitted) > 2
    begun = [future for future in executor.submitted if not future.cancelled()]
    # One thread: what it had begun, and at most the next.
    assert len(begun) <= 2
    assert all(future.done() or future.running() for future in begun)


def interrupted_at_once(workers: Workers, function: Callable[[float], object], jobs: list[float]) -> None:
    for _ in workers.each(function, jobs):
        raise KeyboardInterrupt


@pytest.fixture
def _interrupts_arrive() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which starts them with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_arrive")
def test_an_interruption_while_waiting_leaves_no_job_waiting() -> None:
    release = threading.Event()
    with Recording() as executor:
        # A real signal: only that ends a wait.
        interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                list(Workers(executor, 4).each(release.wait, [20.0] * 9))
            assert_nothing_waits(executor)
        finally:
            release.set()
            interrupt.join()


@pytest.mark.usefixtures("_interrupts_arrive")
def test_an_interruption_while_others_use_the_executor_leaves_no_job_waiting() -> None:
    release = threading.Event()
    with Recording() as executor:
        executor.submit(release.wait, 20.0)
        interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                list(Workers(executor, 4).each(math.sqrt, [4.0] * 9))
            assert [future.cancelled() for future in executor.submitted] == [False, True, True, True, True, True]
        finally:
            release.set()
            interrupt.join()


def test_an_interruption_between_results_leaves_no_job_waiting() -> None:
    release = threading.Event()
    with Recording() as executor:
        try:
            with pytest.raises(KeyboardInterrupt):
                interrupted_at_once(Workers(executor, 4), release.wait, [0.0, *[20.0] * 9])
            assert_nothing_waits(executor)
        finally:
            release.set()


def test_a_failure_leaves_no_job_waiting() -> None:
    release = threading.Event()

    def job(number: int) -> bool:
        assert number, "the first fails"
        return release.wait(20.0)

    with Recording() as executor:
        try:
            with pytest.raises(AssertionError, match="the first fails"):
                list(Workers(executor, 4).each(job, range(9)))
            assert_nothing_waits(executor)
        finally:
            release.set()


@pytest.mark.parametrize("workers", ["threads:2", "processes:2"])
def test_an_interruption_ends_the_pool(workers: str) -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), open_workers(workers) as opened:
        interrupted_at_once(opened, time.sleep, [0.1] * 600)
    # Those in hand end; thirty seconds of others do not begin. Processes take a while to come up.
    assert time.monotonic() - begin < 15
    assert isinstance(opened.executor, Executor)
    with pytest.raises(RuntimeError, match="shutdown"):
        opened.executor.submit(time.sleep, 0)


# ---- texts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text", ["", "fibers", "threads:0", "threads:x", "threads:", "processes:-1", "serial:2", "dask", "dask:", "Threads"]
)
def test_unknown_workers_are_refused(text: str) -> None:
    with (
        pytest.raises(UsageError, match=r"workers '.*' are not known\n  try: use threads, threads:N"),
        Execution(workers=text).resources(),
    ):
        pass


@pytest.mark.parametrize("text", ["serial", "threads:1", "processes:1"])
def test_one_worker_is_this_thread(text: str) -> None:
    with open_workers(text) as workers:
        assert workers is SERIAL


def test_without_dask_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UsageError, match=r"not installed\n  try: pip install 'lcpaq-onnx\[dask\]'"),
        open_workers("dask:tcp://127.0.0.1:8786"),
    ):
        pass


@pytest.mark.parametrize("address", ["nowhere", "foo://bar:1"])
def test_a_bad_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=f"no dask scheduler at '{address}'"), open_workers(f"dask:{address}"):
        pass


def test_a_scheduler_without_workers_is_refused() -> None:
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as empty,
        pytest.raises(UsageError, match="has no workers\n  try: start some"),
        open_workers(f"dask:{empty.scheduler_address}"),
    ):
        pass
