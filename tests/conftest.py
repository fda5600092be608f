"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before anything imports numpy: its threads and those of other test processes would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _store_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands keep what they measured: no test reads or fills the store of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCPAQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
