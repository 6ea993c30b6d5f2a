"""Solver for selection problems: arrays in, one strategy index per node out, with a proven lower bound and the gap, always."""

from .solve import HistoryPoint, Solution, solve

__all__ = ["HistoryPoint", "Solution", "solve"]
