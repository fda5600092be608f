"""The files beside an emitted model: plan, report, measurements. Written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from lcpaq_onnx.errors import LcpaqError, UsageError
from lcpaq_onnx.graph.saving import Writer, write_files
from lcpaq_onnx.planning.measurements_json import measurements_from, measurements_json
from lcpaq_onnx.tables import Measurements

__all__ = [
    "ArtefactPaths",
    "check_writable",
    "measurements_json",
    "read_measurements",
    "read_text",
    "write_measurements",
    "write_texts",
]

SCHEMA = 1
"""Version of the measurements' JSON that this lcpaq reads and writes."""


@dataclass(frozen=True)
class ArtefactPaths:
    """Where ``quantize`` writes: for ``net.onnx`` also ``net.plan.json``, ``net.report.json`` and ``net.report.txt``.

    The stem is the path of the model without ``.onnx``; any other ending stays part of it.
    """

    model: Path
    plan: Path
    report: Path
    report_text: Path

    @classmethod
    def beside(cls, model: Path) -> ArtefactPaths:
        stem = model.name.removesuffix(".onnx")
        return cls(
            model=model,
            plan=model.with_name(f"{stem}.plan.json"),
            report=model.with_name(f"{stem}.report.json"),
            report_text=model.with_name(f"{stem}.report.txt"),
        )

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.model, self.plan, self.report, self.report_text)


def check_writable(paths: tuple[Path, ...]) -> None:
    """Look before minutes of work: raises LcpaqError when a folder is missing or read-only, or a path is a folder."""
    for path in paths:
        folder = path.parent
        if not folder.is_dir():
            raise LcpaqError(f"cannot write {path}: no folder {folder}", hint="make the folder first")
        if path.is_dir():
            raise LcpaqError(f"cannot write {path}: it is a folder", hint="give the path of a file")
        try:
            # Only writing tells: permissions say nothing of read-only file systems, nor to root.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise LcpaqError(
                f"cannot write {path}: {error.strerror} in folder {folder}",
                hint="choose a folder that you may write to",
            ) from error


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write all files as UTF-8, or none: on any failure the old files stand. Raises LcpaqError."""
    try:
        write_files([(path, _writer(text)) for path, text in texts.items()])
    except OSError as error:
        names = ", ".join(str(path) for path in texts)
        raise LcpaqError(
            f"cannot write {names}: {error.strerror or error}",
            hint="choose an existing folder with enough free space",
        ) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 file. Raises UsageError when it is no text, LcpaqError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{os.fspath(path)} is not a text file", hint="check the path") from error
    except OSError as error:
        raise LcpaqError(f"cannot read {os.fspath(path)}: {error.strerror}", hint="check the path") from error


def write_measurements(measurements: Measurements, path: str | os.PathLike[str]) -> None:
    """Write an ``.analysis.json`` file, atomically. Raises LcpaqError when it cannot be written."""
    write_texts({Path(path): measurements_json(measurements)})


def read_measurements(path: str | os.PathLike[str]) -> Measurements:
    """What ``write_measurements`` wrote. Raises LcpaqError when it cannot be read, UsageError when it is not that."""
    name = os.fspath(path)
    again = "write it again with `lcpaq analyze`"
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{name} is not JSON: {error}", hint=again) from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{name} has analysis schema {schema!r}, this lcpaq reads {SCHEMA}", hint=again)
    try:
        return measurements_from(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{name}: {where}: {first['msg']}", hint=again) from error


def _writer(text: str) -> Writer:
    def write(stream: IO[bytes]) -> None:
        stream.write(text.encode("utf-8"))

    return write
