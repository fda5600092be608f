"""Where independent jobs run: here, in threads, in processes, or on any ``concurrent.futures.Executor``."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import PicklingError
from typing import TypeVar

from lcpaq_onnx.errors import UsageError

__all__ = ["DEFAULT_WORKERS", "SERIAL", "Workers", "open_workers"]

J = TypeVar("J")
R = TypeVar("R")

DEFAULT_WORKERS = "threads"
_FORMS = "use threads, threads:N, processes:N, serial, or dask:ADDRESS"


@dataclass(frozen=True, eq=False)
class Workers:
    """``executor`` None runs jobs one after the other. ``count``: how many run at once."""

    executor: Executor | None = None
    count: int = 1

    def each(self, function: Callable[[J], R], jobs: Iterable[J]) -> Iterator[tuple[J, R]]:
        """Every job with its result, in the jobs' order. Jobs are made as late as possible, so that what they hold need
        not be in memory all at once. When the caller stops or a job fails, those not yet begun are dropped.

        Errors of a job are raised as they are; UsageError when a worker ends before its job, or a job cannot reach it.
        """
        if self.executor is None:
            yield from ((job, function(job)) for job in jobs)
            return
        waiting: deque[tuple[J, Future[R]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, _submitted(self.executor, function, job)))
                if len(waiting) > self.count:
                    yield self._first(waiting)
            while waiting:
                yield self._first(waiting)
        finally:
            for _, future in waiting:
                future.cancel()

    def _first(self, waiting: deque[tuple[J, Future[R]]]) -> tuple[J, R]:
        # It stays among the waiting until its result is there: an interruption drops it too.
        job, future = waiting[0]
        result = _result_of(future)
        waiting.popleft()
        return job, result


SERIAL = Workers()


@contextmanager
def open_workers(where: str | Executor) -> Iterator[Workers]:
    """Workers by text, closed at the end, or on the caller's own executor, left open.

    ``threads`` and ``processes``: one for each core, or ``threads:4``. ``serial``. ``dask:ADDRESS``: those of a
    ``dask.distributed`` scheduler. Results do not depend on the choice. Raises UsageError.
    """
    if isinstance(where, Executor):
        # An executor does not tell how many it runs; a few more than needed wait in its queue.
        yield Workers(where, os.cpu_count() or 1)
        return
    kind, colon, argument = where.partition(":")
    if kind == "dask" and argument:
        with _dask(argument) as workers:
            yield workers
        return
    is_known = kind in ("threads", "processes") if colon else kind in ("serial", "threads", "processes")
    if not is_known or (colon and not _is_count(argument)):
        raise UsageError(f"workers '{where}' are not known", hint=_FORMS)
    count = int(argument) if argument else _cores()
    if kind == "serial" or count == 1:
        yield SERIAL
        return
    with _pool(kind, count) as executor:
        try:
            yield Workers(executor, count)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _submitted(executor: Executor, function: Callable[[J], R], job: J) -> Future[R]:
    try:
        return executor.submit(function, job)
    except BrokenExecutor as error:
        raise _dead_worker(error) from error


def _dead_worker(error: Exception) -> UsageError:
    return UsageError(
        f"a worker ended before its job was done: {error}",
        hint="allow less memory, or, where processes never start, call from below `if __name__ == '__main__':`",
    )


def _result_of(future: Future[R]) -> R:
    try:
        return future.result()
    except BrokenExecutor as error:
        raise _dead_worker(error) from error
    except (PicklingError, AttributeError, TypeError) as error:
        # What cannot be pickled is one of the three, by kind of object and version of Python.
        if "pickle" not in str(error):
            raise
        raise UsageError(
            f"a job cannot be sent to another process: {error}",
            hint="define a loss of your own at the top of a module, or use threads",
        ) from error


def _pool(kind: str, count: int) -> Executor:
    if kind == "threads":
        return ThreadPoolExecutor(count, thread_name_prefix="lcpaq")
    # Forking copies the locks of ONNX Runtime's threads, but not the threads.
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_leave_interrupts)


def _leave_interrupts() -> None:
    """Ctrl-C goes to all processes of a terminal; the one that waits for the others deals with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _dask(address: str) -> Iterator[Workers]:
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError("dask.distributed is not installed", hint="pip install 'lcpaq-onnx[dask]'") from error
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no dask scheduler at '{address}': {error}", hint="start one with `dask scheduler`"
        ) from error
    with client:
        count = sum(client.nthreads().values())
        if not count:
            raise UsageError(f"the dask scheduler at '{address}' has no workers", hint="start some with `dask worker`")
        # Not pure: jobs are large, and to hash one takes longer than to send it.
        yield Workers(client.get_executor(pure=False), count)


def _cores() -> int:
    """Those this process may use; a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) >= 1
