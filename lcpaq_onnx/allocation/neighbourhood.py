"""Every plan that differs from one by the width of one or two layers, and what each would change: at once, in numpy.

Layers keep their activation format and stay quantized, so activation groups and operators stay as they are; storage
decisions follow the layers that use them. Layers that are tied to others do not move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.allocation.optimum import Caps
from lcpaq_onnx.allocation.problem import AllocationProblem, AnyOf, Column, Decision
from lcpaq_onnx.formats import LayerFormat
from lcpaq_onnx.numeric.interactions import Entry, Interactions

__all__ = ["Neighbourhood", "entry_of", "followed", "neighbourhood_of"]

Indices = NDArray[np.intp]
Double = NDArray[np.float64]
# Peak memory is a maximum over steps, and only activations live there.
_SUMMED = tuple(column for column in get_args(Column) if column != "peak_memory_bytes")


def entry_of(decision: Decision, format: str) -> Entry | None:
    """What is measured of ``decision`` in ``format``: ``w4`` for a layer in ``w4a8``; None for what costs no error.

    Raises UsageError when a layer's format is not the text of a LayerFormat.
    """
    if decision.kind == "layer":
        bits = LayerFormat.parse(format).weight_bits
        return None if bits is None else (decision.name, f"w{bits}")
    return (decision.name, format) if decision.kind == "activation" and format != "f32" else None


def followed(problem: AllocationProblem, assignment: Mapping[str, str]) -> dict[str, str]:
    """``assignment`` with every storage decision set to what its layers need."""
    result = dict(assignment)
    for rule, absent in _followers(problem):
        result[rule.decision] = rule.format if any(result[n] in formats for n, formats in rule.terms) else absent
    return result


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """``options``: what the layers that may move can take, as (layer, format); ``layer_of`` numbers their layers.

    A change takes the options ``first`` and ``second``; where they are equal it is a single one.
    """

    options: tuple[tuple[str, str], ...]
    layer_of: Indices
    loss: _Quadratic
    costs: Mapping[Column, _Quadratic]
    followers: tuple[_Follower, ...]
    first: Indices
    second: Indices

    def improving(
        self, assignment: Mapping[str, str], least_gain: float, room: Mapping[Column, float]
    ) -> Iterator[tuple[tuple[str, str], ...]]:
        """Changes that lower the loss by more than ``least_gain`` and add no more than ``room``, best first.

        ``room`` of peak memory, and rules between layers, are left to the caller.
        """
        taken = np.array([assignment[name] == format for name, format in self.options], bool)
        current = np.flatnonzero(taken)
        old = current[self.layer_of]
        keep = ~(taken[self.first] | taken[self.second])
        first, second = self.first[keep], self.second[keep]
        change = self.loss.change(current, old, first, second)
        better = change < -least_gain
        first, second, change = first[better], second[better], change[better]
        fits = np.ones(len(first), bool)
        for column, cost in self.costs.items():
            added = cost.change(current, old, first, second)
            for follower in self.followers:
                added += follower.change(column, current, old, first, second)
            fits &= added <= room[column]
        # Stable: single changes stand in front of pairs, so a pair never adds a layer that gains nothing.
        for index in np.flatnonzero(fits)[np.argsort(change[fits], kind="stable")]:
            yield tuple(self.options[i] for i in dict.fromkeys((int(first[index]), int(second[index]))))


def neighbourhood_of(
    problem: AllocationProblem, assignment: Mapping[str, str], interactions: Interactions, caps: Caps
) -> Neighbourhood:
    """The changes around ``assignment`` and around every plan reached from it by such changes."""
    layers = _movable(problem, assignment)
    options = tuple((name, format) for name, formats in layers.items() for format in formats)
    layer_of = np.repeat(np.arange(len(layers)), [len(formats) for formats in layers.values()])
    first, second = np.triu_indices(len(options), 1)
    apart = layer_of[first] != layer_of[second]
    single = np.arange(len(options))
    return Neighbourhood(
        options=options,
        layer_of=layer_of,
        loss=_loss(problem, assignment, interactions, options),
        costs={column: _cost(problem, assignment, options, column) for column in _SUMMED if column in caps},
        followers=tuple(_follower(problem, assignment, options, rule, absent) for rule, absent in _followers(problem)),
        first=np.concatenate([single, first[apart]]),
        second=np.concatenate([single, second[apart]]),
    )


@dataclass(frozen=True, eq=False)
class _Quadratic:
    """``linear · x + xᵀ cross x`` over options taken (1) or not (0); ``cross`` is symmetric."""

    linear: Double
    cross: Double

    def change(self, current: Indices, old: Indices, first: Indices, second: Indices) -> Double:
        """By how much the value changes when ``first`` and ``second`` replace the options ``old`` of their layers."""
        field = self.linear + 2 * self.cross[:, current].sum(axis=1)
        own = np.diagonal(self.cross)
        single = field - field[old] + own + own[old] - 2 * self.cross[np.arange(len(old)), old]
        from_first, from_second = old[first], old[second]
        together = self.cross[first, second] - self.cross[from_first, second]
        together += self.cross[from_first, from_second] - self.cross[first, from_second]
        pair: Double = single[first] + np.where(first == second, 0.0, single[second] + 2 * together)
        return pair


@dataclass(frozen=True, eq=False)
class _Follower:
    """A storage decision: present when any of ``uses`` (terms that hold, by option) or ``fixed_uses`` is not 0."""

    uses: NDArray[np.int64]
    fixed_uses: int
    costs: Mapping[Column, float]

    def change(self, column: Column, current: Indices, old: Indices, first: Indices, second: Indices) -> Double:
        """What its appearing or vanishing adds to ``column``."""
        shift = self.uses - self.uses[old]
        before = self.fixed_uses + int(self.uses[current].sum())
        after = before + shift[first] + np.where(first == second, 0, shift[second])
        return self.costs[column] * ((after > 0).astype(np.float64) - (before > 0))


def _movable(problem: AllocationProblem, assignment: Mapping[str, str]) -> dict[str, list[str]]:
    """Formats by layer, for layers that have more than the one they are in."""
    tied = {name for tie in problem.ties if len(tie.decisions) > 1 for name in tie.decisions}
    layers = {}
    for decision in problem.decisions:
        if decision.kind != "layer" or decision.name in tied:
            continue
        current = LayerFormat.parse(assignment[decision.name])
        formats = [o.format for o in decision.options if _is_alike(LayerFormat.parse(o.format), current)]
        if not current.is_float and len(formats) > 1:
            layers[decision.name] = formats
    for name, forbidden in _forbidden(problem, assignment, layers.keys()):
        layers[name] = [format for format in layers[name] if format not in forbidden]
    return layers


def _is_alike(format: LayerFormat, other: LayerFormat) -> bool:
    return not format.is_float and format.activation_bits == other.activation_bits


def _forbidden(
    problem: AllocationProblem, assignment: Mapping[str, str], layers: Collection[str]
) -> Iterator[tuple[str, Collection[str]]]:
    """Formats that break a requirement with a decision that does not move."""
    for rule in problem.requirements:
        if rule.decision in layers and rule.needs not in layers and assignment[rule.needs] not in rule.needed_formats:
            yield rule.decision, rule.formats
        if rule.needs in layers and rule.decision not in layers and assignment[rule.decision] in rule.formats:
            formats = {option.format for option in problem.decision_of[rule.needs].options}
            yield rule.needs, formats.difference(rule.needed_formats)


def _loss(
    problem: AllocationProblem,
    assignment: Mapping[str, str],
    interactions: Interactions,
    options: tuple[tuple[str, str], ...],
) -> _Quadratic:
    row_of = interactions.row_of
    moving = {name for name, _ in options}
    entries = [entry_of(problem.decision_of[name], format) for name, format in options]
    known = np.array([i for i, entry in enumerate(entries) if entry in row_of], np.intp)
    rows = [row_of[entry] for entry in entries if entry in row_of]
    still = [entry_of(d, assignment[d.name]) for d in problem.decisions if d.name not in moving]
    still_rows = [row_of[entry] for entry in still if entry in row_of]
    linear = np.array([problem.option_of[option].loss for option in options], np.float64)
    linear[known] = 2 * interactions.gram[np.ix_(rows, still_rows)].sum(axis=1)
    cross = np.zeros((len(options), len(options)))
    cross[np.ix_(known, known)] = interactions.gram[np.ix_(rows, rows)]
    return _Quadratic(linear, cross)


def _cost(
    problem: AllocationProblem, assignment: Mapping[str, str], options: tuple[tuple[str, str], ...], column: Column
) -> _Quadratic:
    """Of the options and of the conversions they pay, between themselves or with a decision that does not move."""
    index_of = {option: index for index, option in enumerate(options)}
    moving = {name for name, _ in options}
    linear = np.array([float(getattr(problem.option_of[option], column)) for option in options])
    cross = np.zeros((len(options), len(options)))
    for boundary in problem.boundaries if column in ("size_bytes", "latency_us") else ():
        cost = float(boundary.size_bytes if column == "size_bytes" else boundary.latency_us)
        first, second = (
            [index_of[name, format] for format in formats if (name, format) in index_of]
            for name, formats in ((boundary.first, boundary.first_formats), (boundary.second, boundary.second_formats))
        )
        if boundary.first in moving and boundary.second in moving:
            cross[np.ix_(first, second)] += cost / 2
            cross[np.ix_(second, first)] += cost / 2
        elif boundary.first in moving and assignment[boundary.second] in boundary.second_formats:
            linear[first] += cost
        elif boundary.second in moving and assignment[boundary.first] in boundary.first_formats:
            linear[second] += cost
    return _Quadratic(linear, cross)


def _followers(problem: AllocationProblem) -> Iterator[tuple[AnyOf, str]]:
    """Rules of storage decisions, and the format that each has when nothing needs it."""
    for rule in problem.any_ofs:
        decision = problem.decision_of[rule.decision]
        others = [option.format for option in decision.options if option.format != rule.format]
        if decision.kind == "storage" and len(others) == 1:
            yield rule, others[0]


def _follower(
    problem: AllocationProblem,
    assignment: Mapping[str, str],
    options: tuple[tuple[str, str], ...],
    rule: AnyOf,
    absent: str,
) -> _Follower:
    moving = {name for name, _ in options}
    present, without = (problem.option_of[rule.decision, format] for format in (rule.format, absent))
    return _Follower(
        uses=np.array([sum(n == name and format in f for n, f in rule.terms) for name, format in options], np.int64),
        fixed_uses=sum(assignment[name] in formats for name, formats in rule.terms if name not in moving),
        costs={column: float(getattr(present, column)) - float(getattr(without, column)) for column in _SUMMED},
    )
