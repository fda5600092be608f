"""Calibration data: single-sample feeds that fit the model, streamed from a path or from Python, any number of times.

A path is one of
- a ``.npz`` file: arrays named as the model's inputs, axis 0 counts samples and is kept (``x[i : i + 1]`` is fed);
- a folder of ``.npz`` files, or of ``.npy`` files for a model with one input: each file one complete feed;
- a folder of ONNX ``test_data_set_*`` folders, or one of them: ``input_k.pb`` feeds the model's k-th input;
- a folder of images with ``preprocess.toml`` in it, or that file anywhere (see ``image_folder``).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lcpaq_onnx.errors import CalibrationError, LcpaqError, UsageError
from lcpaq_onnx.runtime.feeds import Feed, fit_feed
from lcpaq_onnx.runtime.image_folder import SPEC_NAME, open_images
from lcpaq_onnx.runtime.sample_sources import (
    ArrayFolder,
    IterableSource,
    NpzArchive,
    RandomSource,
    SampleSource,
    SpooledSource,
    TestDataSets,
    natural_order,
)
from lcpaq_onnx.runtime.session import Session, TensorSpec

__all__ = [
    "CalibrationData",
    "Feed",
    "Source",
    "feed_digest",
    "is_batchable",
    "joined_feed",
    "open_calibration",
    "random_data",
    "stacks",
]

Source = (
    str
    | os.PathLike[str]
    | Iterable[Mapping[str, np.ndarray]]
    | Callable[[], Iterable[Mapping[str, np.ndarray]]]
)  # fmt: skip
_PAIR_SEARCH_SAMPLES = 32
_ACCEPTED = (
    "give a .npz file, a folder of .npz or .npy files, of test_data_set_* folders, or of images with preprocess.toml"
)


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """A stream of feeds, one sample each, that can be read again and holds one sample in memory at a time."""

    source: SampleSource
    inputs: tuple[TensorSpec, ...]
    limit: int | None = None

    @property
    def sample_count(self) -> int | None:
        """How many samples a reading gives; None where only a reading can tell."""
        count = self.source.count
        return count if self.limit is None or count is None else min(count, self.limit)

    @property
    def description(self) -> str:
        """For reports, e.g. ``npz digits.npz (first 64 of 256 samples; ignored: label)``."""
        total, used = self.source.count, self.sample_count
        if total is None:
            size = "" if self.limit is None else f"at most {self.limit} samples"
        else:
            size = f"{total} samples" if used == total else f"first {used} of {total} samples"
        details = "; ".join(filter(None, (size, self.source.note)))
        return f"{self.source.description} ({details})" if details else self.source.description

    def __iter__(self) -> Iterator[Feed]:
        """Feeds in the inputs' order and types. Raises CalibrationError for a sample that does not fit the model, for
        NaN or infinite values, and when there is no sample at all."""
        empty = True
        for index, sample in enumerate(itertools.islice(self.source.samples(), self.limit)):
            yield fit_feed(sample.arrays, self.inputs, f"{sample.where}, sample {index}")
            empty = False
        if empty:
            raise CalibrationError(
                f"no samples in {self.source.description}",
                hint="calibration needs at least one; a callable must return a fresh iterator at each call",
            )

    def take(self, samples: int | None) -> CalibrationData:
        """The first ``samples`` of these data; None gives all. Raises UsageError below 1."""
        if samples is None:
            return self
        if samples < 1:
            raise UsageError(f"{samples} calibration samples", hint="use 1 or more")
        return replace(self, limit=samples if self.limit is None else min(samples, self.limit))

    def batches(self, size: int) -> Iterator[Feed]:
        """Consecutive samples of equal shapes joined on axis 0, at most ``size`` of them, in order.

        A sample with a 0-d input stays alone: there is no axis to join on. See ``is_batchable``.
        """
        return (joined_feed(feeds) for feeds in stacks(self, size))

    def fingerprint(self) -> str:
        """sha256 over names, types, shapes and bytes of all feeds, in hex; reads all data once."""
        digest = hashlib.sha256()
        for feed in self:
            feed_digest(digest, feed)
        return digest.hexdigest()


def stacks(feeds: Iterable[Feed], size: int) -> Iterator[list[Feed]]:
    """Consecutive feeds that can be joined, at most ``size`` of them."""
    pending: list[Feed] = []
    for feed in feeds:
        if pending and (len(pending) == size or not _joinable(pending[0], feed)):
            yield pending
            pending = []
        pending.append(feed)
    if pending:
        yield pending


def joined_feed(feeds: Sequence[Feed]) -> Feed:
    """The feeds joined on axis 0."""
    return feeds[0] if len(feeds) == 1 else {n: np.concatenate([feed[n] for feed in feeds]) for n in feeds[0]}


def feed_digest(digest: hashlib._Hash, feed: Feed) -> None:
    """Add names, types, shapes and bytes of ``feed`` to ``digest``."""
    for name, array in feed.items():
        digest.update(f"{name}\0{array.dtype.str}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())


def open_calibration(source: Source, inputs: Sequence[TensorSpec], *, samples: int | None = None) -> CalibrationData:
    """Calibration data for a model with these ``inputs`` (``Session.inputs``), the first ``samples`` of them.

    ``source`` is a path (see the module), an iterable of mappings input name -> array (each one complete feed), or a
    callable that returns a fresh iterable. An iterator that can be read once only is written to a temporary file here
    (an endless one needs ``samples``). Raises CalibrationError when the data are missing or do not fit.
    """
    for spec in inputs:
        if not spec.is_tensor:
            raise CalibrationError(
                f"input '{spec.name}' is a {spec.type_name}, which calibration data cannot feed",
                hint="export the model with plain tensors as inputs",
            )
    if isinstance(source, CalibrationData):
        return replace(source, inputs=tuple(inputs)).take(samples)
    opened = _open_path(Path(source), inputs) if isinstance(source, str | os.PathLike) else _open_python(source)
    data = CalibrationData(opened, tuple(inputs)).take(samples)
    if isinstance(source, Iterator):
        spooled = SpooledSource(data, inputs, opened.description)
        return replace(data, source=spooled)
    return data


def random_data(inputs: Sequence[TensorSpec], count: int, seed: int) -> CalibrationData:
    """Random samples, with a warning: ranges and errors measured on them say little about real inputs.

    An unknown first dimension becomes 1; another unknown dimension is a CalibrationError.
    """
    for spec in inputs:
        if spec.dtype.kind == "U" or not spec.is_tensor or not all(isinstance(dim, int) for dim in spec.shape[1:]):
            raise CalibrationError(f"no random data for input {spec}", hint="give real calibration data")
    warnings.warn("calibrating on random data: accuracy will suffer; give real inputs", stacklevel=2)
    shapes = tuple(tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape) for spec in inputs)
    return CalibrationData(RandomSource(tuple(inputs), shapes, count, seed), tuple(inputs)).take(count)


def is_batchable(session: Session, data: CalibrationData, tolerance: float = 1e-4) -> bool:
    """Whether the model takes several samples stacked on axis 0 and treats each as if alone. Tried, not guessed.

    Two samples (one and its mirror image if there is but one of that shape) run singly and together; float outputs
    must agree within ``tolerance`` of the output's largest magnitude (kernels may sum in another order), others
    exactly. A model with a fixed or no first dimension, or that fails on two samples, is not batchable.
    """
    if any(not spec.shape or isinstance(spec.shape[0], int) for spec in session.inputs):
        return False
    first, second = _unlike_pair(data)
    singles = [session.run(first), session.run(second)]
    try:
        together = session.run(joined_feed([first, second]))
    except LcpaqError:
        return False
    return all(_stacks([single[name] for single in singles], out, tolerance) for name, out in together.items())


def _open_path(path: Path, inputs: Sequence[TensorSpec]) -> SampleSource:
    if path.is_file() and path.suffix == ".npz":
        return NpzArchive.open(path, inputs)
    if path.is_file() and path.suffix == ".toml":
        return open_images(path, inputs)
    if not path.is_dir():
        state = "is not calibration data" if path.exists() else "does not exist"
        raise CalibrationError(f"'{path}' {state}", hint=_ACCEPTED)
    if (path / SPEC_NAME).is_file():
        return open_images(path / SPEC_NAME, inputs)
    if any(path.glob("input_*.pb")):
        return TestDataSets((path,), tuple(inputs))
    folders = sorted((p for p in path.glob("test_data_set_*") if p.is_dir()), key=natural_order)
    if folders:
        return TestDataSets(tuple(folders), tuple(inputs))
    npz, npy = (sorted(path.glob(f"[!.]*.{kind}"), key=natural_order) for kind in ("npz", "npy"))
    if npz and npy:
        raise CalibrationError(f"'{path}' holds .npz and .npy files", hint="keep one kind; each file is one feed")
    if not npz and not npy:
        raise CalibrationError(f"'{path}' holds no calibration data", hint=_ACCEPTED)
    return ArrayFolder(tuple(npz or npy), tuple(inputs))


def _open_python(
    source: Iterable[Mapping[str, np.ndarray]] | Callable[[], Iterable[Mapping[str, np.ndarray]]],
) -> SampleSource:
    if isinstance(source, Mapping):
        raise CalibrationError(
            "a single mapping is not calibration data",
            hint="give [feed] for one sample, or save the arrays as .npz with samples on axis 0",
        )
    if isinstance(source, Iterable):
        return IterableSource(lambda: source, type(source).__name__, len(source) if isinstance(source, Sized) else None)
    if callable(source):
        return IterableSource(source, f"callable {getattr(source, '__name__', type(source).__name__)}", None)
    raise CalibrationError(
        f"a {type(source).__name__} is not calibration data",
        hint="give a path, an iterable of dicts (input name -> array), or a callable that returns one",
    )


def _joinable(first: Feed, second: Feed) -> bool:
    return all(array.ndim > 0 and array.shape == second[name].shape for name, array in first.items())


def _unlike_pair(data: CalibrationData) -> tuple[Feed, Feed]:
    """The first sample and another of its shapes that differs from it, made by mirroring if need be."""
    feeds = iter(data)
    first = next(feeds)
    for other in itertools.islice(feeds, _PAIR_SEARCH_SAMPLES):
        if _joinable(first, other) and any(not np.array_equal(array, other[name]) for name, array in first.items()):
            return first, other
    # Half of the mirror image: mirrored alone, a symmetric sample would stay as it is.
    return first, {
        name: np.flip(array) * array.dtype.type(0.5) if array.dtype.kind == "f" else np.flip(array)
        for name, array in first.items()
    }


def _stacks(singles: Sequence[np.ndarray], together: np.ndarray, tolerance: float) -> bool:
    if any(single.ndim == 0 for single in singles) or len({single.shape[1:] for single in singles}) > 1:
        return False
    expected = np.concatenate(singles)
    if expected.shape != together.shape:
        return False
    if together.dtype.kind != "f":
        return np.array_equal(expected, together)
    largest = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    limit = max(tolerance, 4 * float(np.finfo(together.dtype).eps)) * largest
    return bool(np.allclose(together, expected, rtol=0.0, atol=limit, equal_nan=True))
