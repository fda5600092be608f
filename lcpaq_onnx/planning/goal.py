"""What the user asked for, and the plan for it by predicted error: nothing here runs a model."""

from __future__ import annotations

from dataclasses import dataclass

from lcpaq_onnx.allocation.allocate import Objective
from lcpaq_onnx.budget import Budget
from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.plan import Plan
from lcpaq_onnx.planning.planner import Planner, tolerated_error

__all__ = ["FASTEST", "Goal", "exchanged_plan_for", "plan_for"]

_OBJECTIVES: dict[Objective, tuple[Objective, ...]] = {
    "error": ("error", "latency"),
    "latency": ("latency", "error"),
    "size": ("size", "error"),
}
FASTEST: tuple[Objective, ...] = ("latency", "size", "error")


@dataclass(frozen=True)
class Goal:
    """Budgets, objective (None: what fits the budgets) and the formats the planner may use."""

    budgets: tuple[Budget, ...]
    objective: Objective | None
    allowed: Allowed

    @property
    def is_default(self) -> bool:
        """Neither budget nor objective: the fastest plan within the default error, never slower than float."""
        return not self.budgets and self.objective is None

    @property
    def error_budget(self) -> Budget | None:
        """The budget on error, if there is one."""
        return next((budget for budget in self.budgets if budget.dimension == "error"), None)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What to minimise, first things first."""
        if self.objective is not None:
            return _OBJECTIVES[self.objective]
        return FASTEST if self.error_budget else _OBJECTIVES["error"]


def plan_for(planner: Planner, goal: Goal) -> Plan:
    """The plan for ``goal`` by predicted error.

    With an objective, just that. With an error budget: fastest, then smallest. Else least error, but speed is not given
    up for error that nobody can see: the fastest plan whose error is within a tenth of the least, or within the
    default. Raises BudgetError when none fits.
    """
    asked = _asked(planner, goal)
    return asked.state(planner.plan(asked.budgets, asked.objectives))


def exchanged_plan_for(planner: Planner, goal: Goal) -> Plan | None:
    """``plan_for`` after an exchange of widths between layers by cross terms; None where that promises nothing."""
    asked = _asked(planner, goal)
    plan = planner.exchanged(asked.budgets, asked.objectives)
    return None if plan is None else asked.state(plan)


@dataclass(frozen=True)
class _Asked:
    """What the planner is asked for, and what the plan says that the user asked for."""

    budgets: tuple[Budget, ...]
    objectives: tuple[Objective, ...]
    stated_budgets: tuple[str, ...]
    stated_objective: tuple[str, ...]

    def state(self, plan: Plan) -> Plan:
        return plan.model_copy(update={"budgets": self.stated_budgets, "objective": self.stated_objective})


def _asked(planner: Planner, goal: Goal) -> _Asked:
    stated = tuple(map(str, goal.budgets))
    if goal.objective is not None or goal.error_budget is not None:
        return _Asked(goal.budgets, goal.objectives, stated, goal.objectives)
    least = planner.least_error(goal.budgets)
    limit = tolerated_error(least)
    objective = (f"latency at error<={limit.limit:.3g}% (the least is {100 * least:.3g}%)", "error")
    return _Asked((*goal.budgets, limit), _OBJECTIVES["latency"], stated, objective)
