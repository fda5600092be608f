"""Options of a frozen dataclass: from a ``Spec``, type-checked against the annotations, and back to the same text.

A field takes what its annotation says: int, float, bool, str, ``Literal``, a class with ``parse`` and ``str`` (such as
``LayerFormat``), a dataclass of options (an analysis that this one builds on, as a quoted text), a tuple of these, a
frozenset of tuples (as a JSON text), and unions with None. What ``options_text`` prints, ``build`` reads back as an
equal object.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.manager.spec_text import Scalar, Spec, parse_specs, parse_values, values_text

__all__ = ["Options", "build", "nearest_hint", "options_text"]


class Options(Protocol):
    """A dataclass whose fields are options, under a kebab-case ``name``; also the base of such classes."""

    name: ClassVar[str]


OptionsT = TypeVar("OptionsT", bound=Options)


class _MismatchError(Exception):
    """Values that an annotation does not take; always caught here."""


def nearest_hint(word: str, known: Collection[str]) -> str:
    """``did you mean 'fold'? known: fold, insert`` for a ``word`` that is not in ``known``."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}known: {', '.join(sorted(known)) or '(none)'}"


def build(cls: type[OptionsT], spec: Spec) -> OptionsT:
    """An instance of dataclass ``cls`` with the options of ``spec``.

    Raises PassError for an unknown, missing or mistyped option; it names the option, its type and what was written.
    """
    options = _option_fields(cls)
    hints = get_type_hints(cls)
    values: dict[str, object] = {}
    for key, written in spec.options:
        if key not in options:
            raise PassError(f"'{cls.name}' has no option '{key}'", hint=nearest_hint(key, options))
        annotation = hints[options[key].name]
        try:
            values[options[key].name] = _convert(written, annotation)
        except _MismatchError:
            raise PassError(
                f"option '{key}' of '{cls.name}' is {_type_text(annotation)}, but got '{values_text(written)}'",
                hint=f"write e.g. {cls.name}{{{key}={_example(annotation)}}}",
            ) from None
    missing = [key for key, field in options.items() if field.name not in values and not _has_default(field)]
    if missing:
        examples = " ".join(f"{key}={_example(hints[options[key].name])}" for key in missing)
        raise PassError(
            f"'{cls.name}' needs the option{'s' * (len(missing) > 1)} {', '.join(missing)}",
            hint=f"write e.g. {cls.name}{{{examples}}}",
        )
    return cls(**values)


def options_text(instance: Options) -> str:
    """``name{key=value …}`` with the fields that differ from their defaults, in the order of the fields.

    Raises PassError for a value that would not read back as itself: of another type than its annotation, or NaN.
    """
    hints = get_type_hints(type(instance))
    parts = []
    for key, field in _option_fields(type(instance)).items():
        value: object = getattr(instance, field.name)
        if _has_default(field) and value == _default(field):
            continue
        if isinstance(value, frozenset):
            value = json.dumps(sorted(value))
        values = value if isinstance(value, tuple) else (value,)
        text = values_text(values)
        if not _reads_back(text, getattr(instance, field.name), hints[field.name]):
            raise PassError(
                f"option '{key}' of '{instance.name}' holds {value!r}, which is not {_type_text(hints[field.name])}",
                hint="give the option a value of its annotated type",
            )
        parts.append(f"{key}={text}" if values else key)
    return f"{instance.name}{{{' '.join(parts)}}}" if parts else instance.name


def _option_fields(cls: type[Options]) -> dict[str, Field[object]]:
    return {field.name.replace("_", "-"): field for field in fields(cast("Any", cls)) if field.init}


def _has_default(field: Field[object]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _default(field: Field[object]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _reads_back(text: str, value: object, annotation: object) -> bool:
    try:
        return _convert(parse_values(text), annotation) == value
    except _MismatchError:
        return False


def _arms(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _convert(written: tuple[Scalar, ...], annotation: object) -> object:
    """What stood between the commas as a value of ``annotation``; the first arm of a union that takes it wins."""
    for arm in _arms(annotation):
        try:
            return _convert_tuple(written, arm) if get_origin(arm) is tuple else _convert_single(written, arm)
        except _MismatchError:
            continue
    raise _MismatchError


def _convert_tuple(written: tuple[Scalar, ...], annotation: object) -> tuple[object, ...]:
    arguments = get_args(annotation)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(written)
    if len(arguments) != len(written):
        raise _MismatchError
    return tuple(_convert((value,), argument) for value, argument in zip(written, arguments, strict=True))


def _convert_single(written: tuple[Scalar, ...], annotation: object) -> object:
    if annotation is bool and not written:
        return True
    if len(written) != 1:
        raise _MismatchError
    value = written[0]
    if get_origin(annotation) is frozenset and isinstance(value, str):
        return _convert_set(value, *get_args(annotation))
    if get_origin(annotation) is Literal:
        # 1 == True: a literal must agree in type too.
        if any(value == choice and type(value) is type(choice) for choice in get_args(annotation)):
            return value
        raise _MismatchError
    if annotation is float and type(value) is int:
        return float(value)
    if annotation in (int, float, bool, str, NoneType):
        if type(value) is annotation:
            return value
        raise _MismatchError
    if isinstance(annotation, type) and isinstance(value, str):
        return _convert_text(value, annotation)
    raise _MismatchError


def _convert_set(text: str, annotation: object) -> frozenset[object]:
    """A JSON list of lists as a set of tuples."""
    try:
        items = json.loads(text)
    except ValueError:
        raise _MismatchError from None
    if not isinstance(items, list) or not all(isinstance(item, list) for item in items):
        raise _MismatchError
    return frozenset(_convert_tuple(tuple(item), annotation) for item in items)


def _convert_text(text: str, cls: type) -> object:
    """``text`` as an instance of ``cls``: by its ``parse``, or as options in their turn."""
    parse = getattr(cls, "parse", None)
    if callable(parse):
        return parse(text)
    if not is_dataclass(cls) or not hasattr(cls, "name"):
        raise _MismatchError
    specs = parse_specs(text)
    if len(specs) != 1 or specs[0].name != cls.name:
        raise _MismatchError
    return build(cast("type[Options]", cls), specs[0])


def _type_text(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _example(annotation: object) -> str:
    """A value that the annotation takes, for hints."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return values_text(arguments[:1])
    if arguments:
        return _example(arguments[0])
    examples: dict[object, str] = {int: "1", float: "0.5", bool: "true", str: "word"}
    return examples.get(annotation, "…")
