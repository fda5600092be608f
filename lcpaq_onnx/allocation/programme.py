"""The allocation problem as matrices: one binary column per decision and format, continuous ones for conversions.

Tied decisions share their columns. A conversion between two decisions is written as the convex hull of its cost where
that needs one or two columns per pair, else with the pair's joint choice (the local polytope), so that the linear
relaxation stays tight: that is what lets branch and bound finish.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lcpaq_onnx.allocation.milp import FloatArray, Rows
from lcpaq_onnx.allocation.problem import AllocationProblem, MemoryStep

__all__ = ["Programme", "build_programme"]

_Columns = npt.NDArray[np.int64]
# Costs on a diagonal of a 2 × 2 table: the hull is one inequality per paid pair.
_DIAGONALS = ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})
_SUMMED = ("loss", "squared_error", "size_bytes", "latency_us", "bops", "stored_bits")


@dataclass(frozen=True)
class Programme:
    """``costs[column]`` has one coefficient per variable, ``fixed[column]`` the constant.

    The first ``choices`` variables are binary, the others continuous in [0, 1].
    ``groups`` are the tied decisions: their names and (format, variable) pairs. ``steps`` are the memory steps as rows
    over the variables, in bytes with the fixed part beside them; ``rules`` hold for every legal assignment.
    """

    problem: AllocationProblem
    choices: int
    costs: Mapping[str, FloatArray]
    fixed: Mapping[str, float]
    groups: tuple[tuple[tuple[str, ...], tuple[tuple[str, int], ...]], ...]
    rules: Rows
    steps: tuple[tuple[FloatArray, npt.NDArray[np.int64], int], ...]

    @property
    def width(self) -> int:
        """Number of variables."""
        return len(self.costs["loss"])

    def assignment(self, x: FloatArray) -> dict[str, str]:
        """Decision → format of a solution, in the order of the problem."""
        chosen = {}
        for names, columns in self.groups:
            format_ = max(columns, key=lambda pair: x[pair[1]])[0]
            chosen.update(dict.fromkeys(names, format_))
        return {decision.name: chosen[decision.name] for decision in self.problem.decisions}

    def vector(self, assignment: Mapping[str, str]) -> FloatArray:
        """Inverse of ``assignment``; conversion columns are left open (NaN)."""
        x = np.full(self.width, np.nan)
        x[: self.choices] = 0
        for names, columns in self.groups:
            x[dict(columns)[assignment[names[0]]]] = 1
        return x

    def exclusion(self, assignment: Mapping[str, str]) -> Rows:
        """A row that only this assignment breaks."""
        taken = np.flatnonzero(self.vector(assignment) == 1).astype(np.int64)
        return Rows.below(taken, np.ones(len(taken)), len(taken) - 1.0)


def build_programme(problem: AllocationProblem) -> Programme:
    """Translate ``problem``. Cost and time are linear in its size (times formats squared at boundaries)."""
    builder = _Builder(problem)
    builder.add_choices()
    builder.add_rules()
    builder.add_boundaries()
    width = builder.width
    costs = {name: _dense(builder.costs[name], width) for name in _SUMMED}
    costs["rank"] = _dense(builder.costs["rank"], width)
    fixed = dict.fromkeys((*_SUMMED, "rank"), 0.0)
    fixed |= {"bops": problem.fixed_bops}
    fixed |= {"size_bytes": problem.fixed_size_bytes + builder.always["size_bytes"]}
    fixed |= {"latency_us": problem.fixed_latency_us + builder.always["latency_us"]}
    groups = tuple((names, tuple(builder.columns[names[0]].items())) for names in builder.groups)
    steps = tuple(dict.fromkeys(builder.step(step) for step in problem.memory_steps))
    return Programme(
        problem=problem,
        choices=builder.choices,
        costs=costs,
        fixed=fixed,
        groups=groups,
        rules=builder.rows.done(),
        steps=tuple(
            (np.array(values), np.array(columns, np.int64), fixed_bytes) for values, columns, fixed_bytes in steps
        ),
    )


@dataclass
class _RowList:
    row: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, terms: Iterable[tuple[int, float]], lower: float, upper: float) -> None:
        for column, value in terms:
            self.row.append(len(self.lower))
            self.column.append(column)
            self.value.append(value)
        self.lower.append(lower)
        self.upper.append(upper)

    def done(self) -> Rows:
        return Rows(
            row=np.array(self.row, np.int64),
            column=np.array(self.column, np.int64),
            value=np.array(self.value, np.float64),
            lower=np.array(self.lower, np.float64),
            upper=np.array(self.upper, np.float64),
        )


class _Builder:
    """Collects columns and rows; its methods run once each, in the order of ``build_programme``."""

    def __init__(self, problem: AllocationProblem) -> None:
        self.problem = problem
        self.rows = _RowList()
        self.costs: dict[str, dict[int, float]] = {name: {} for name in (*_SUMMED, "rank")}
        self.always = {"size_bytes": 0.0, "latency_us": 0.0}
        self.groups = _tied(problem)
        self.columns: dict[str, dict[str, int]] = {}  # decision → format → variable, shared by tied decisions
        self.width = 0
        self.choices = 0

    def add_choices(self) -> None:
        for position, names in enumerate(self.groups):
            decisions = [self.problem.decision_of[name] for name in names]
            common = set.intersection(*({o.format for o in d.options} for d in decisions))
            formats = [o.format for o in decisions[0].options if o.format in common]
            columns = {format_: self.width + i for i, format_ in enumerate(formats)}
            self.width += len(columns)
            self.rows.add(((column, 1.0) for column in columns.values()), 1.0, 1.0)
            # Equal plans: fewest steps down the lists of options, and those at the front of the problem.
            weight = 1 + (len(self.groups) - position) / (1000 * len(self.groups))
            for decision in decisions:
                self.columns[decision.name] = columns
                for rank, option in enumerate(o for o in decision.options if o.format in common):
                    for name in _SUMMED:
                        self._charge(name, columns[option.format], float(getattr(option, name)))
                    self._charge("rank", columns[option.format], rank * weight)
        self.choices = self.width

    def add_rules(self) -> None:
        for r in self.problem.requirements:
            self.rows.add([*self._any(r.decision, r.formats), *self._any(r.needs, r.needed_formats, -1.0)], -np.inf, 0)
        for c in self.problem.conjunctions:
            own = self._any(c.decision, (c.format,))
            for name, formats in c.terms:
                self.rows.add([*own, *self._any(name, formats, -1.0)], -np.inf, 0)
            terms = [entry for name, formats in c.terms for entry in self._any(name, formats, -1.0)]
            self.rows.add([*own, *terms], 1.0 - len(c.terms), np.inf)
        for a in self.problem.any_ofs:
            own = self._any(a.decision, (a.format,))
            for name, formats in a.terms:
                self.rows.add([*own, *self._any(name, formats, -1.0)], 0, np.inf)
            terms = [entry for name, formats in a.terms for entry in self._any(name, formats, -1.0)]
            self.rows.add([*own, *terms], -np.inf, 0)

    def add_boundaries(self) -> None:
        """Sum the costs of each pair of tied groups into one table format × format × (bytes, µs), then linearise it."""
        tables: dict[tuple[int, int], FloatArray] = {}
        group_of = {name: index for index, names in enumerate(self.groups) for name in names}
        formats = [list(self.columns[names[0]]) for names in self.groups]
        for b in self.problem.boundaries:
            sides = [(group_of[b.first], b.first_formats), (group_of[b.second], b.second_formats)]
            sides.sort(key=lambda side: side[0])
            (first, first_formats), (second, second_formats) = sides
            table = tables.setdefault((first, second), np.zeros((len(formats[first]), len(formats[second]), 2)))
            hit_first = [f in first_formats for f in formats[first]]
            hit_second = [f in second_formats for f in formats[second]]
            table += np.outer(hit_first, hit_second)[:, :, None] * np.array([b.size_bytes, b.latency_us])
        for (first, second), table in sorted(tables.items()):
            columns = [np.array(list(self.columns[self.groups[side][0]].values())) for side in (first, second)]
            if first == second:
                self._charge_pair(columns[0], table[np.arange(len(table)), np.arange(len(table))])
            else:
                self._linearise(columns[0], columns[1], table)

    def step(self, step: MemoryStep) -> tuple[tuple[float, ...], tuple[int, ...], int]:
        """Bytes per variable alive at ``step``: values, variables, fixed bytes."""
        live: dict[int, float] = {}
        for name, sizes in step.live:
            for format_, size in sizes:
                column = self.columns[name].get(format_)
                if column is not None and size:
                    live[column] = live.get(column, 0.0) + size
        ordered = sorted(live.items())
        return tuple(v for _, v in ordered), tuple(c for c, _ in ordered), step.fixed_bytes

    def _linearise(self, first: _Columns, second: _Columns, table: FloatArray) -> None:
        if not table.size:
            return  # a group without a common format: infeasible anyway
        # Formats with equal costs towards the other side are one class: int against float leaves 2 × 2.
        row_sides = _classes(table)
        column_sides = _classes(table.transpose(1, 0, 2))
        if len(row_sides) == 1:
            return self._charge_pair(second, table[0])
        if len(column_sides) == 1:
            return self._charge_pair(first, table[:, 0])
        costs = table[np.ix_([rows[0] for rows in row_sides], [columns[0] for columns in column_sides])]
        paid = {(i, j) for i, j in np.ndindex(*costs.shape[:2]) if costs[i, j].any()}
        if costs.shape[:2] == (2, 2) and (len(paid) == 1 or paid in _DIAGONALS):
            for i, j in sorted(paid):  # paid >= both chosen - 1
                both = (*first[row_sides[i]].tolist(), *second[column_sides[j]].tolist())
                self.rows.add([(self._new_column(costs[i, j]), 1.0), *((c, -1.0) for c in both)], -1.0, np.inf)
            return
        # One column per pair of classes, whose sums are the choices on either side.
        joint = np.array([[self._new_column(cost) for cost in row] for row in costs])
        self._balance([first[rows] for rows in row_sides], joint)
        self._balance([second[columns] for columns in column_sides], joint.T)

    def _balance(self, sides: Sequence[_Columns], joint: _Columns) -> None:
        """Per side, its columns sum to its row of ``joint``."""
        for chosen, together in zip(sides, joint, strict=True):
            entries = [(column, 1.0) for column in together.tolist()]
            self.rows.add([*entries, *((column, -1.0) for column in chosen.tolist())], 0.0, 0.0)

    def _charge_pair(self, columns: _Columns, costs: FloatArray) -> None:
        for column, (size_bytes, latency_us) in zip(columns.tolist(), costs.tolist(), strict=True):
            self._charge("size_bytes", column, size_bytes)
            self._charge("latency_us", column, latency_us)

    def _new_column(self, cost: FloatArray) -> int:
        self.width += 1
        self._charge("size_bytes", self.width - 1, float(cost[0]))
        self._charge("latency_us", self.width - 1, float(cost[1]))
        return self.width - 1

    def _charge(self, name: str, column: int, cost: float) -> None:
        if cost:
            self.costs[name][column] = self.costs[name].get(column, 0.0) + cost

    def _any(self, name: str, formats: Iterable[str], sign: float = 1.0) -> list[tuple[int, float]]:
        """Entries whose sum is ``sign`` when the decision takes one of ``formats`` (those its tie leaves)."""
        own = self.columns[name]
        return [(own[format_], sign) for format_ in dict.fromkeys(formats) if format_ in own]


def _tied(problem: AllocationProblem) -> tuple[tuple[str, ...], ...]:
    """The decisions grouped by ties, both in the order of the problem."""
    leader = {decision.name: decision.name for decision in problem.decisions}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    for tie in problem.ties:
        for name in tie.decisions[1:]:
            leader[find(name)] = find(tie.decisions[0])
    groups: dict[str, list[str]] = {}
    for decision in problem.decisions:
        groups.setdefault(find(decision.name), []).append(decision.name)
    return tuple(tuple(names) for names in groups.values())


def _classes(table: FloatArray) -> list[npt.NDArray[np.intp]]:
    """Indices along axis 0 grouped by equal content, in the order of their first member."""
    members: dict[bytes, list[int]] = {}
    for index, part in enumerate(table):
        members.setdefault(part.tobytes(), []).append(index)
    return [np.array(indices) for indices in members.values()]


def _dense(entries: Mapping[int, float], width: int) -> FloatArray:
    dense = np.zeros(width)
    dense[list(entries)] = list(entries.values())
    return dense
