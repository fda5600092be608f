"""The exceptions a user can meet. Bugs stay ``AssertionError``.

Every message names what was wrong, where (file, node, tensor), and the next thing to try. ``exit_code`` is what the
command line returns for the class.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CheckError",
    "LcpaqError",
    "ModelError",
    "PassError",
    "TargetError",
    "UsageError",
]


class LcpaqError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        """``message`` says what is wrong and where; ``hint`` says what to try next (one sentence)."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


class UsageError(LcpaqError):
    """The call itself is wrong: unknown option, malformed budget, selector that matches nothing."""

    exit_code = 2


class ModelError(LcpaqError):
    """The ONNX model cannot be read, is invalid, or cannot be run."""


class CalibrationError(LcpaqError):
    """The calibration data are missing, empty, not finite, or do not fit the model's inputs."""


class TargetError(LcpaqError):
    """A hardware target is unknown or its descriptor is invalid."""


class PassError(LcpaqError):
    """A pass or pipeline cannot be parsed, or a pass failed on this graph."""


class BudgetError(LcpaqError):
    """No plan meets the budget; the message holds the least budget that works."""

    exit_code = 1


class CheckError(LcpaqError):
    """An emitted file failed a check (checker, numerics, size, measured budget)."""

    exit_code = 1
