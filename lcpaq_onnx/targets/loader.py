"""Finds, inherits and validates target descriptors. Every mistake names file, key and the nearest known key."""

from __future__ import annotations

import difflib
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lcpaq_onnx.errors import TargetError
from lcpaq_onnx.graph.signatures import is_known_operator, known_operators
from lcpaq_onnx.targets.target import Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["available", "load"]

Raw = dict[str, object]
# What a descriptor says of itself and must not take from its parent.
_OWN_KEYS = ("schema", "name", "description", "inherits")


def available() -> tuple[str, ...]:
    """Names of the built-in targets, sorted."""
    return tuple(sorted(path.stem for path in _built_in_folder().glob("*.toml")))


def load(name_or_path: str | Path) -> Target:
    """The target of a built-in name, or of a descriptor file (a ``Path``, or a text ending in ``.toml``).

    Its latency table is the ``.csv`` of the same stem beside the file, if there is one; a table is never inherited,
    since it was measured on another machine. Raises TargetError.
    """
    path = _find(name_or_path)
    chain = _chain(path)
    merged: Raw = {}
    for _, raw in reversed(chain):
        merged = _merge({key: value for key, value in merged.items() if key not in _OWN_KEYS}, raw)
    _check_operators(merged, chain)
    return _READERS[_schema_of(chain[0][1], path)](merged, chain)


def _read_schema_1(merged: Raw, chain: list[tuple[Path, Raw]]) -> Target:
    table = chain[0][0].with_suffix(".csv")
    merged.pop("inherits", None)
    try:
        # JSON, because pydantic's strict mode takes arrays for tuples and texts for integer keys only from there.
        return Target.build(json.dumps(merged, default=str), table if table.is_file() else None)
    except ValidationError as error:
        # A misspelt key also makes a required one missing: the misspelling is the better news.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise _explain(details[0], chain) from error


# A later schema gets a reader of its own; this dispatch is what keeps old files loading.
_READERS: Mapping[int, Callable[[Raw, list[tuple[Path, Raw]]], Target]] = {1: _read_schema_1}


def _built_in_folder() -> Path:
    return Path(str(files("lcpaq_onnx.hw_targets")))


def _find(name_or_path: str | Path, folder: Path | None = None) -> Path:
    """``folder``: where relative paths start (the inheriting file's), default the working directory."""
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        path = (folder or Path()) / name_or_path
        if not path.is_file():
            raise TargetError(f"no target descriptor at {path}", hint="check the path, or use a built-in target's name")
        return path
    names = available()
    if name_or_path not in names:
        raise TargetError(
            f"unknown target '{name_or_path}'; built in are {', '.join(names)}",
            hint=f"{_did_you_mean(name_or_path, names)}or give the path of a .toml file",
        )
    return _built_in_folder() / f"{name_or_path}.toml"


def _chain(path: Path) -> list[tuple[Path, Raw]]:
    """The descriptor and its ancestors, child first."""
    chain: list[tuple[Path, Raw]] = []
    while True:
        if path.resolve() in [seen.resolve() for seen, _ in chain]:
            raise TargetError(
                f"{chain[0][0]}: inherits in a circle: {' -> '.join(p.name for p in [*(p for p, _ in chain), path])}",
                hint="remove one of the 'inherits' keys",
            )
        raw = _read_toml(path)
        _schema_of(raw, path)
        chain.append((path, raw))
        parent = raw.get("inherits")
        if parent is None:
            return chain
        if not isinstance(parent, str):
            raise TargetError(f"{path}: key 'inherits': must be a text", hint="name a built-in target or a .toml file")
        try:
            path = _find(parent, path.parent)
        except TargetError as error:
            raise TargetError(f"{chain[-1][0]}: key 'inherits': {error.message}", hint=error.hint) from error


def _read_toml(path: Path) -> Raw:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not TOML: {error}", hint="see docs/targets.md for an example") from error
    except OSError as error:
        raise TargetError(f"cannot read {path}: {error.strerror}", hint="check the file's permissions") from error


def _schema_of(raw: Raw, path: Path) -> int:
    version = raw.get("schema")
    if isinstance(version, bool) or not isinstance(version, int) or version not in _READERS:
        known = " or ".join(map(str, _READERS))
        said = "no schema version" if version is None else f"schema version {version}"
        raise TargetError(
            f"{path}: {said}; this lcpaq reads version {known}",
            hint=f"write 'schema = {max(_READERS)}', or update lcpaq",
        )
    return version


def _merge(parent: Raw, child: Raw) -> Raw:
    """Tables merge key by key, everything else is replaced."""
    merged = dict(parent)
    for key, value in child.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _check_operators(merged: Raw, chain: list[tuple[Path, Raw]]) -> None:
    operators = merged.get("operators")
    for op in operators if isinstance(operators, dict) else ():
        if not is_known_operator(op):
            raise TargetError(
                f"{_origin(('operators', op), chain)}: key 'operators.{op}': ONNX has no such operator",
                hint=f"{_did_you_mean(op, known_operators())}see the operator list of ONNX",
            )


def _explain(error: ErrorDetails, chain: list[tuple[Path, Raw]]) -> TargetError:
    """The first mistake, as file, dotted key, and what to write instead."""
    # A dict key's own mistake has the location (…, key, "[key]").
    location = tuple(part for part in error["loc"] if part != "[key]")
    path = _origin(location, chain)
    dotted = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        return TargetError(f"{path}: unknown key '{dotted}'", hint=_nearest_key(location))
    if error["type"] == "missing":
        return TargetError(
            f"{chain[0][0]}: key '{dotted}' is missing", hint="add it, or inherit it; see docs/targets.md"
        )
    if not location:
        return TargetError(f"{path}: {error.get('ctx', {}).get('error', error['msg'])}", hint="see docs/targets.md")
    choices = re.findall(r"'([^']+)'", str(error.get("ctx", {}).get("expected", "")))
    message = f"{path}: key '{dotted}': {error['msg']}, not {error['input']!r}"
    return TargetError(message, hint=f"{_did_you_mean(str(error['input']), choices)}see docs/targets.md")


def _origin(location: tuple[int | str, ...], chain: list[tuple[Path, Raw]]) -> Path:
    """The file of the chain, child first, that wrote the key; the child where none did."""
    for path, raw in chain:
        value: object = raw
        for part in location:
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif not isinstance(value, list):
                break
        else:
            return path
    return chain[0][0]


def _nearest_key(location: tuple[int | str, ...]) -> str:
    keys = _keys_of(Target, location[:-1]) + (("inherits",) if len(location) == 1 else ())
    return f"{_did_you_mean(str(location[-1]), keys)}the keys here are {', '.join(keys)}"


def _keys_of(annotation: object, location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Known keys of the table at ``location`` inside a model type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
        return _keys_of(fields[str(location[0])], location[1:]) if location else tuple(fields)
    arguments = [argument for argument in typing.get_args(annotation) if argument is not Ellipsis]
    return _keys_of(arguments[-1], location[1:]) if arguments and location else ()


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, sorted(known), n=1)
    return f"'{nearest[0]}', " if nearest else ""
