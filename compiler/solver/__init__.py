"""Solver for selection problems: arrays in, one strategy index per node out, with a proven lower bound and the gap, always."""

if __name__ != "opweave.compiler.solver":
    # compiled kernels are cached with the names of their argument types: a second name for this package would break the cache for the first
    raise ImportError(f"this package is 'opweave.compiler.solver', not {__name__!r}; import it from the installed package opweave")

from .quiet import nothing_printed
from .solution import HistoryPoint, Solution
from .solve import solve, warm_up, warm_up_search

__all__ = ["HistoryPoint", "Solution", "nothing_printed", "solve", "warm_up", "warm_up_search"]
