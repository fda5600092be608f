"""Where passes are found by name: the built-in ones, the first plug-in, and those of other installed packages.

A package adds passes and analyses by entry points of the group ``lcpaq_onnx.passes``; in its pyproject.toml:

    [project.entry-points."lcpaq_onnx.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.manager.analysis import Analysis, AnyAnalysis
from lcpaq_onnx.manager.options import nearest_hint
from lcpaq_onnx.manager.pass_base import RewritePass
from lcpaq_onnx.manager.spec_text import NAME
from lcpaq_onnx.passes import BUILTIN_ANALYSES, BUILTIN_PASSES

__all__ = ["ENTRY_POINT_GROUP", "Entry", "Registry", "StepClass", "builtin_registry", "installed_registry"]

ENTRY_POINT_GROUP = "lcpaq_onnx.passes"
_BUILTIN = "lcpaq-onnx"

StepClass = type[RewritePass] | type[AnyAnalysis]


@dataclass(frozen=True)
class Entry:
    """A pass or analysis that is known but not imported: ``reference`` is ``module:Class``, ``provider`` a package."""

    name: str
    reference: str
    provider: str

    def __str__(self) -> str:
        return f"{self.reference} of {self.provider}"

    def load(self) -> StepClass:
        """Import the class. Raises PassError when it cannot be imported or is not what a pass must be."""
        hint = f"fix the entry point of package {self.provider}, or uninstall the package"
        module, _, attribute = self.reference.partition(":")
        try:
            found: object = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a foreign module does when imported
            raise PassError(
                f"cannot import pass '{self.name}' ({self}): {type(error).__name__}: {error}", hint=hint
            ) from error
        reason = _refusal(self.name, found)
        if reason:
            raise PassError(f"pass '{self.name}' ({self}) {reason}", hint=hint)
        return cast("StepClass", found)


@dataclass(frozen=True)
class Registry:
    """Passes and analyses by name; nothing is imported before it is asked for."""

    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Registry:
        """Raises PassError for two entries of one name, naming both, and for a name that is not kebab-case."""
        known: dict[str, Entry] = {}
        for entry in entries:
            if not NAME.fullmatch(entry.name):
                raise PassError(
                    f"pass name '{entry.name}' ({entry}) is not kebab-case", hint="name it like fold-constants"
                )
            if entry.name in known:
                raise PassError(
                    f"two passes are named '{entry.name}': {known[entry.name]} and {entry}",
                    hint=f"uninstall {entry.provider} or rename its pass",
                )
            known[entry.name] = entry
        return cls(dict(sorted(known.items())))

    def load(self, name: str) -> StepClass:
        """The class named ``name``. Raises PassError with the nearest name when there is none."""
        if name not in self.entries:
            raise PassError(f"no pass or analysis is named '{name}'", hint=nearest_hint(name, self.entries))
        return self.entries[name].load()


def builtin_registry() -> Registry:
    """The passes and analyses of this package alone."""
    return Registry.of(_builtin_entries())


def installed_registry() -> Registry:
    """Built-in passes and those of all installed packages; the latter are looked up anew at each call."""
    return Registry.of([*_builtin_entries(), *_foreign_entries()])


def _builtin_entries() -> list[Entry]:
    tables = (BUILTIN_PASSES, BUILTIN_ANALYSES)
    return [Entry(name, reference, _BUILTIN) for table in tables for name, reference in table.items()]


def _foreign_entries() -> list[Entry]:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    found = [
        Entry(point.name, point.value, point.dist.name if point.dist else "an unknown package") for point in points
    ]
    return sorted(found, key=lambda entry: (entry.name, entry.provider, entry.reference))


def _refusal(name: str, found: object) -> str:
    """Why ``found`` cannot be the pass ``name``; empty when it can."""
    if not isinstance(found, type) or not issubclass(found, RewritePass | Analysis):
        return "is neither a RewritePass nor an Analysis"
    if inspect.isabstract(found):
        return f"does not define {', '.join(sorted(found.__abstractmethods__))}"
    own_name = getattr(found, "name", None)
    if own_name != name:
        return f"calls itself '{own_name}'; the names must agree"
    # Of the class itself: an undecorated subclass would inherit the options of its base, not its own.
    parameters = vars(found).get("__dataclass_params__")
    return "" if parameters is not None and parameters.frozen else "is not a frozen dataclass"
