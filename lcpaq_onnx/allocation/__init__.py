"""Choosing formats: the problem as values, and the integer linear programme that solves it."""
