"""Arithmetic on plain arrays: rounding, ranges, losses, the Hessian estimator. numpy and scipy only."""
