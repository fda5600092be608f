"""The grammar of pipelines: ``fold-batch-norm,insert-qdq{weights-only=true axes=1,2,3 mode="a b"}``, text to ``Spec``.

Names and options are kebab-case. A value is an int, a float, ``true``/``false``, ``none``, a bare word or a quoted JSON
string; commas make tuples; a key may stand without ``=`` (``true`` for a bool, ``()`` for a tuple).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NoReturn, cast

from lcpaq_onnx.errors import PassError

__all__ = ["NAME", "Scalar", "Spec", "parse_specs", "parse_values", "values_text"]

Scalar = int | float | bool | str | None

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_BARE = re.compile(r"[A-Za-z0-9_.:/+-]+")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf|nan")
_CONSTANTS: dict[str, Scalar] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Spec:
    """One parsed step, not yet checked against a class. A value is the tuple of what stood between the commas."""

    name: str
    options: tuple[tuple[str, tuple[Scalar, ...]], ...] = ()


def parse_specs(text: str) -> tuple[Spec, ...]:
    """The steps of a pipeline text; blank text is the empty pipeline. Raises PassError with the column of a mistake."""
    scanner = _Scanner(text)
    if scanner.at_end():
        return ()
    specs = [_parse_spec(scanner)]
    while not scanner.at_end():
        scanner.expect(",", "',' or the end")
        specs.append(_parse_spec(scanner))
    return tuple(specs)


def _parse_spec(scanner: _Scanner) -> Spec:
    name = scanner.expect(NAME, "a kebab-case name")
    if scanner.take("{") is None:
        return Spec(name)
    options: dict[str, tuple[Scalar, ...]] = {}
    while scanner.take("}") is None:
        key = scanner.expect(NAME, "a kebab-case option or '}'")
        if key in options:
            scanner.fail(f"option '{key}' only once")
        options[key] = _parse_values(scanner) if scanner.take("=") is not None else ()
    return Spec(name, tuple(options.items()))


def _parse_values(scanner: _Scanner) -> tuple[Scalar, ...]:
    values = [_parse_value(scanner)]
    while scanner.take(",") is not None:
        values.append(_parse_value(scanner))
    return tuple(values)


def _parse_value(scanner: _Scanner) -> Scalar:
    quoted = scanner.take(_QUOTED)
    if quoted is not None:
        try:
            return cast("str", json.loads(quoted))
        except ValueError:
            scanner.fail("a string in JSON's escapes")
    return _classify(scanner.expect(_BARE, "a value"))


def _classify(word: str) -> Scalar:
    """What a bare word means."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if _INT.fullmatch(word):
        return int(word)
    return float(word) if _FLOAT.fullmatch(word) else word


@dataclass
class _Scanner:
    """The text and how far it is read; white space between tokens does not matter."""

    text: str
    at: int = 0

    def at_end(self) -> bool:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at == len(self.text)

    def take(self, token: str | re.Pattern[str]) -> str | None:
        self.at_end()
        match = re.compile(re.escape(token) if isinstance(token, str) else token).match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match[0]

    def expect(self, token: str | re.Pattern[str], wanted: str) -> str:
        found = self.take(token)
        return self.fail(wanted) if found is None else found

    def fail(self, wanted: str) -> NoReturn:
        raise PassError(
            f"pipeline text: expected {wanted} at column {self.at + 1}\n    {self.text}\n    {' ' * self.at}^",
            hint='write e.g. fold-batch-norm,insert-qdq{axes=1,2,3 mode="a b"}',
        )


def parse_values(text: str) -> tuple[Scalar, ...]:
    """Inverse of ``values_text``."""
    return _parse_values(_Scanner(text)) if text else ()


def values_text(values: tuple[object, ...]) -> str:
    """Values between commas; a string is quoted where a bare word would read as something else."""
    return ",".join(_value_text(value) for value in values)


def _value_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    is_bare = _BARE.fullmatch(text) is not None and isinstance(_classify(text), str)
    return text if is_bare else json.dumps(text)
