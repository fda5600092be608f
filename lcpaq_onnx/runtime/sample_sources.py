"""Where samples come from: .npz archives, folders of arrays, ONNX test data, Python iterables, random numbers.

A source is a value that can be read any number of times; each reading opens its files anew. What it yields is not
checked yet: ``CalibrationData`` fits every sample to the model.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from lcpaq_onnx.errors import CalibrationError
from lcpaq_onnx.runtime.feeds import Feed, match_names, matching_note
from lcpaq_onnx.runtime.npz_stream import NPZ_ERRORS, ArrayHeader, read_headers, read_rows, unreadable
from lcpaq_onnx.runtime.session import TensorSpec

__all__ = [
    "ArrayFolder",
    "IterableSource",
    "NpzArchive",
    "RandomSource",
    "Sample",
    "SampleSource",
    "SpooledSource",
    "TestDataSets",
    "natural_order",
]


class Sample(NamedTuple):
    """One feed as found, and the place to name in errors."""

    where: str
    arrays: Mapping[str, np.ndarray]


class SampleSource(Protocol):
    """Reads its samples anew at each call of ``samples``. ``count`` is None where only a reading can tell."""

    @property
    def description(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def count(self) -> int | None: ...
    def samples(self) -> Iterator[Sample]: ...


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key with numbers by value: sample_2 before sample_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


@dataclass(frozen=True)
class NpzArchive:
    """One .npz; axis 0 counts samples and is kept. A 0-d array (a sampling rate, say) goes with every sample."""

    path: Path
    headers: Mapping[str, ArrayHeader]
    matched: Mapping[str, str]
    count: int

    @classmethod
    def open(cls, path: Path, inputs: Sequence[TensorSpec]) -> NpzArchive:
        """Read the headers. Raises CalibrationError: damaged, an input without array, unlike numbers of samples."""
        headers = read_headers(path)
        matched = match_names(headers.keys(), inputs, f"'{path}'")
        counts = {name: headers[array].shape[0] for name, array in matched.items() if headers[array].shape}
        if len(set(counts.values())) > 1:
            raise CalibrationError(
                f"the arrays of '{path}' have unlike numbers of samples on axis 0: {counts}",
                hint="give each array one row per sample, or save a folder of .npz files with one complete feed each",
            )
        return cls(path, headers, matched, next(iter(counts.values()), 1))

    @property
    def description(self) -> str:
        return f"npz {self.path.name}"

    @property
    def note(self) -> str:
        return matching_note(self.headers.keys(), self.matched)

    def samples(self) -> Iterator[Sample]:
        names = [name for name, array in self.matched.items() if self.headers[array].shape]
        constants = {n: next(read_rows(self.path, a)) for n, a in self.matched.items() if not self.headers[a].shape}
        if not names:
            yield Sample(f"'{self.path}'", constants)
            return
        streams = [read_rows(self.path, self.matched[name]) for name in names]
        for rows in zip(*streams, strict=True):
            yield Sample(f"'{self.path}'", {**constants, **dict(zip(names, rows, strict=True))})


@dataclass(frozen=True)
class ArrayFolder:
    """A folder of .npz files, or of .npy files for a model with one input; each file is one complete feed."""

    files: tuple[Path, ...]
    inputs: tuple[TensorSpec, ...]

    @property
    def description(self) -> str:
        return f"{self.files[0].suffix[1:]} folder {self.files[0].parent.name}"

    @property
    def note(self) -> str:
        """Of the first file; the others are read when their turn comes."""
        if self.files[0].suffix == ".npy":
            return ""
        names = read_headers(self.files[0]).keys()
        return matching_note(names, match_names(names, self.inputs, f"'{self.files[0]}'"))

    @property
    def count(self) -> int:
        return len(self.files)

    def samples(self) -> Iterator[Sample]:
        for path in self.files:
            yield Sample(f"'{path}'", _load_feed(path, self.inputs))


def _load_feed(path: Path, inputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    if path.suffix == ".npy" and len(inputs) != 1:
        raise CalibrationError(
            f"'{path}' holds one array and the model has {len(inputs)} inputs",
            hint="save one .npz file per sample: np.savez(path, " + ", ".join(f"{s.name}=…" for s in inputs) + ")",
        )
    try:
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npy" and isinstance(loaded, np.ndarray):
            return {inputs[0].name: loaded}
        if isinstance(loaded, np.ndarray):
            raise ValueError("it is a .npy file by content")
        with loaded as archive:
            matched = match_names(archive.files, inputs, f"'{path}'")
            return {name: archive[array] for name, array in matched.items()}
    except NPZ_ERRORS as error:
        raise unreadable(path, error) from error


@dataclass(frozen=True)
class TestDataSets:
    """ONNX test data: folders of ``input_k.pb``, each the TensorProto of the model's k-th input."""

    __test__ = False  # not a pytest class

    folders: tuple[Path, ...]
    inputs: tuple[TensorSpec, ...]
    note: str = ""

    @property
    def description(self) -> str:
        return f"ONNX test data {self.folders[0].parent.name if len(self.folders) > 1 else self.folders[0].name}"

    @property
    def count(self) -> int:
        return len(self.folders)

    def samples(self) -> Iterator[Sample]:
        for folder in self.folders:
            files = sorted(folder.glob("input_*.pb"), key=natural_order)
            expected = [f"input_{index}.pb" for index in range(len(self.inputs))]
            if [file.name for file in files] != expected:
                raise CalibrationError(
                    f"'{folder}' holds {[file.name for file in files]}; the model's inputs need {expected}",
                    hint="number the files by the model's inputs, from 0",
                )
            tensors = (_read_tensor(file) for file in files)
            yield Sample(f"'{folder}'", {spec.name: t for spec, t in zip(self.inputs, tensors, strict=True)})


def _read_tensor(path: Path) -> np.ndarray:
    try:
        return numpy_helper.to_array(onnx.load_tensor(path), base_dir=str(path.parent))
    except (DecodeError, OSError, TypeError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"'{path}' is not a TensorProto: {error}",
            hint="write it with onnx.save_tensor(onnx.numpy_helper.from_array(x), path); only tensors can be fed",
        ) from error


@dataclass(frozen=True)
class IterableSource:
    """Mappings from Python, each one complete feed; ``start`` gives a fresh iterator for each reading."""

    start: Callable[[], Iterable[Mapping[str, np.ndarray]]]
    description: str
    count: int | None
    note: str = ""

    def samples(self) -> Iterator[Sample]:
        for index, item in enumerate(self.start()):
            if not isinstance(item, Mapping):
                raise CalibrationError(
                    f"sample {index} of the {self.description} is a {type(item).__name__}, not a mapping",
                    hint="yield one dict per sample: input name -> array",
                )
            yield Sample(f"the {self.description}", {name: _as_array(value, index) for name, value in item.items()})


def _as_array(value: object, index: int) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # ragged lists
        raise CalibrationError(f"sample {index} is not an array: {error}", hint="yield numpy arrays") from error


class SpooledSource:
    """Feeds written one after the other to a temporary file, which goes with this object."""

    note = ""

    def __init__(self, feeds: Iterable[Feed], inputs: Sequence[TensorSpec], description: str) -> None:
        """Read ``feeds`` to the end, holding one at a time. They fit ``inputs`` already (``fit_feed``)."""
        self.description = description
        self._inputs = tuple(inputs)
        with tempfile.NamedTemporaryFile(prefix="lcpaq-", suffix=".feeds", delete=False) as spool:
            self._path = Path(spool.name)
            weakref.finalize(self, self._path.unlink, missing_ok=True)
            self.count = 0
            for feed in feeds:
                for spec in self._inputs:
                    np.lib.format.write_array(spool, feed[spec.name], allow_pickle=False)
                self.count += 1

    def samples(self) -> Iterator[Sample]:
        with self._path.open("rb") as spool:
            for _ in range(self.count):
                arrays = {s.name: np.lib.format.read_array(spool, allow_pickle=False) for s in self._inputs}
                # .npy files keep ml_dtypes' types as plain bytes
                fits = {s.name: a.view(s.dtype) if (a := arrays[s.name]).dtype.kind == "V" else a for s in self._inputs}
                yield Sample(f"the {self.description}", fits)


@dataclass(frozen=True)
class RandomSource:
    """Standard normal floats; integers and booleans 0 or 1, which are valid as tokens, indices and masks."""

    inputs: tuple[TensorSpec, ...]
    shapes: tuple[tuple[int, ...], ...]
    count: int
    seed: int
    note: str = ""

    @property
    def description(self) -> str:
        return f"random data (seed {self.seed})"

    def samples(self) -> Iterator[Sample]:
        for index in range(self.count):
            rng = np.random.default_rng((self.seed, index))
            yield Sample(self.description, {s.name: self._draw(rng, s, shape) for s, shape in self._pairs()})

    def _pairs(self) -> Iterator[tuple[TensorSpec, tuple[int, ...]]]:
        return zip(self.inputs, self.shapes, strict=True)

    @staticmethod
    def _draw(rng: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
        if spec.dtype.kind in "iub":
            return rng.integers(0, 2, shape).astype(spec.dtype)
        return np.asarray(rng.standard_normal(shape)).astype(spec.dtype)
