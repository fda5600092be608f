"""Threads of the linear algebra libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_blas_thread"]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products and factors on one thread: sums in the same order on machines of any size, and no waiting for
    threads that ONNX Runtime keeps busy.
    """
    from scipy.linalg import lapack  # noqa: F401 - brings a library of its own, which is limited only once it is there
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield
