"""Mixed-integer linear programmes through OR-Tools MathOpt with HiGHS. The only file that imports ortools.

HiGHS runs on one thread with a fixed seed, so equal programmes give equal answers. Its tolerances are absolute; callers
scale rows and objective to about ``SCALE`` so that they are the same relative ones everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ortools.math_opt.python import mathopt

__all__ = ["SCALE", "FloatArray", "Milp", "Outcome", "Relaxation", "Rows", "SearchLimits", "relax", "solve"]

FloatArray = npt.NDArray[np.float64]
SCALE = 1e4
# Relative to SCALE this is 1e-11, what a double still resolves in a sum of thousands of terms.
_TOLERANCE = 1e-7
_SEED = 1


@dataclass(frozen=True)
class Rows:
    """Sparse rows ``lower <= A x <= upper`` as triplets; entries on one place add up."""

    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    value: FloatArray
    lower: FloatArray
    upper: FloatArray

    @classmethod
    def below(cls, column: npt.NDArray[np.int64], value: FloatArray, upper: float) -> Rows:
        """One row ``value · x[column] <= upper``."""
        return cls(np.zeros(len(column), np.int64), column, value, np.array([-np.inf]), np.array([upper]))

    @classmethod
    def stacked(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of ``parts``, in their order."""
        starts = np.cumsum([0, *(len(part.lower) for part in parts)])
        return cls(
            row=np.concatenate([part.row + start for part, start in zip(parts, starts, strict=False)]),
            column=np.concatenate([part.column for part in parts]),
            value=np.concatenate([part.value for part in parts]),
            lower=np.concatenate([part.lower for part in parts]),
            upper=np.concatenate([part.upper for part in parts]),
        )

    def merged(self) -> Rows:
        """The same rows with one entry per place, ordered by row and column (MathOpt wants both)."""
        width = int(self.column.max(initial=0)) + 1
        keys, inverse = np.unique(self.row * width + self.column, return_inverse=True)
        value = np.bincount(inverse, weights=self.value, minlength=len(keys))
        kept = value != 0
        return replace(self, row=keys[kept] // width, column=keys[kept] % width, value=value[kept])


@dataclass(frozen=True)
class Milp:
    """Minimise ``offset + objective · x`` with 0 <= x <= upper; the first ``integers`` columns are integer."""

    objective: FloatArray
    offset: float
    upper: FloatArray
    integers: int
    rows: Rows


@dataclass(frozen=True)
class SearchLimits:
    """When to stop: gap to the proven bound (relative to the optimum), wall seconds, branch-and-bound nodes."""

    relative_gap: float
    seconds: float
    nodes: int | None = None


@dataclass(frozen=True)
class Outcome:
    """``optimal``: proven within the gap; ``feasible``: a solution without that proof; ``unknown``: none found in time.

    ``bound`` is the proven lower bound of the objective (offset included); ``x`` is None without a solution.
    """

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    x: FloatArray | None
    bound: float


@dataclass(frozen=True)
class Relaxation:
    """Optimum of the linear relaxation, d(optimum)/d(bound) of each row, reduced cost and value of each column."""

    value: float
    duals: FloatArray
    reduced_costs: FloatArray
    x: FloatArray


def solve(milp: Milp, limits: SearchLimits, hint: FloatArray | None = None) -> Outcome:
    """Minimise. ``hint`` is a (partial, NaN = open) starting solution, used only when it turns out feasible."""
    from ortools.math_opt.python import mathopt

    model = _model(milp, integers=milp.integers)
    started = []
    if hint is not None:
        columns = list(model.variables())
        known = np.flatnonzero(~np.isnan(hint))
        started = [mathopt.SolutionHint(variable_values={columns[i]: float(hint[i]) for i in known})]
    with _nothing_on_stdout():
        result = mathopt.solve(
            model,
            mathopt.SolverType.HIGHS,
            params=_parameters(limits),
            model_params=mathopt.ModelSolveParameters(
                variable_values_filter=mathopt.VariableFilter(skip_zero_values=True), solution_hints=started
            ),
        )
    reason = result.termination.reason
    infeasible = (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED)
    if reason in infeasible:
        return Outcome("infeasible", None, np.inf)
    bound = float(result.termination.objective_bounds.dual_bound)
    if not result.has_primal_feasible_solution():
        return Outcome("unknown", None, bound)
    status: Literal["optimal", "feasible"] = "optimal" if reason == mathopt.TerminationReason.OPTIMAL else "feasible"
    return Outcome(status, _dense(result.variable_values(), len(milp.upper)), bound)


def relax(milp: Milp, seconds: float) -> Relaxation | None:
    """Solve the linear relaxation; None when it is infeasible or not solved in ``seconds``."""
    from ortools.math_opt.python import mathopt

    model = _model(milp, integers=0)
    result = mathopt.solve(
        model,
        mathopt.SolverType.HIGHS,
        params=_parameters(SearchLimits(0.0, seconds)),
        model_params=mathopt.ModelSolveParameters(
            variable_values_filter=mathopt.VariableFilter(skip_zero_values=True),
            dual_values_filter=mathopt.LinearConstraintFilter(skip_zero_values=True),
            reduced_costs_filter=mathopt.VariableFilter(skip_zero_values=True),
        ),
    )
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL or not result.has_dual_feasible_solution():
        return None
    return Relaxation(
        value=float(result.objective_value()),
        duals=_dense(result.dual_values(), len(milp.rows.lower)),
        reduced_costs=_dense(result.reduced_costs(), len(milp.upper)),
        x=_dense(result.variable_values(), len(milp.upper)),
    )


def _dense(
    values: Mapping[mathopt.Variable, float] | Mapping[mathopt.LinearConstraint, float], size: int
) -> FloatArray:
    """All values by id. Zeros were left out: MathOpt makes a Python object of each that it returns."""
    dense = np.zeros(size)
    dense[[key.id for key in values]] = list(values.values())
    return dense


def _model(milp: Milp, *, integers: int) -> mathopt.Model:
    from ortools.math_opt import model_pb2
    from ortools.math_opt.python import mathopt

    count = len(milp.upper)
    rows = milp.rows.merged()
    # Filled as one protobuf: ten times faster than a Python call per coefficient.
    proto = model_pb2.ModelProto()
    proto.variables.ids.extend(range(count))
    proto.variables.lower_bounds.extend([0.0] * count)
    proto.variables.upper_bounds.extend(milp.upper.tolist())
    proto.variables.integers.extend([True] * integers + [False] * (count - integers))
    costly = np.flatnonzero(milp.objective)
    proto.objective.offset = milp.offset
    proto.objective.linear_coefficients.ids.extend(costly.tolist())
    proto.objective.linear_coefficients.values.extend(milp.objective[costly].tolist())
    proto.linear_constraints.ids.extend(range(len(rows.lower)))
    proto.linear_constraints.lower_bounds.extend(rows.lower.tolist())
    proto.linear_constraints.upper_bounds.extend(rows.upper.tolist())
    proto.linear_constraint_matrix.row_ids.extend(rows.row.tolist())
    proto.linear_constraint_matrix.column_ids.extend(rows.column.tolist())
    proto.linear_constraint_matrix.coefficients.extend(rows.value.tolist())
    return mathopt.Model.from_model_proto(proto)


@contextlib.contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Point file descriptor 1 at nowhere.

    The HiGHS in OR-Tools 9.15 has a bare printf (``transformNewIntegerFeasibleSolution tmpSolver.run();``) that no
    option silences, and standard output is where the command line writes its JSON. What other threads print meanwhile
    is lost.
    """
    try:
        kept = os.dup(1)
    except OSError:  # no standard output to protect
        yield
        return
    _flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)


def _flush() -> None:
    """Empty Python's and C's buffers of standard output; C's is out of reach on Windows."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()
    if sys.platform != "win32":
        ctypes.CDLL(None).fflush(None)


def _parameters(limits: SearchLimits) -> mathopt.SolveParameters:
    from ortools.math_opt.python import mathopt
    from ortools.math_opt.solvers import highs_pb2

    highs = highs_pb2.HighsOptionsProto(
        string_options={"parallel": "off"},
        # Restarts solve the root again where the relaxation is nearly tight, as here. On 12 networks of 200 layers the
        # median time is the same without them (1.1 s), the slowest 3.4 s instead of 7.4 s, the plans equal.
        bool_options={"mip_allow_restart": False},
        double_options={
            "mip_feasibility_tolerance": _TOLERANCE,
            "primal_feasibility_tolerance": _TOLERANCE,
            "dual_feasibility_tolerance": _TOLERANCE,
        },
    )
    return mathopt.SolveParameters(
        random_seed=_SEED,
        relative_gap_tolerance=limits.relative_gap,
        absolute_gap_tolerance=0.0,
        time_limit=datetime.timedelta(seconds=limits.seconds),
        node_limit=limits.nodes,
        highs=highs,
    )
