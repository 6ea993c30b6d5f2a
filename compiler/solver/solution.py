"""The answer of the solver and of each of its engines."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..problem import SelectionProblem

ROUNDING = 2e-9
"""Relative gaps below this are rounding errors of the bounds."""

Status = Literal["optimal", "feasible", "infeasible"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPoint:
    """One improvement: seconds since the start, best objective so far (inf if none), proven lower bound."""

    seconds: float
    objective: float
    lower_bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The answer to a problem.

    ``optimal``: ``objective`` is within the asked gap of the proven ``lower_bound``. ``feasible``: it is not (yet).
    ``infeasible``: proven, or nothing found in time; ``reason`` says which, ``selection`` is empty and ``objective`` infinite.
    """

    selection: np.ndarray  # int64[N], empty if there is none
    objective: float
    lower_bound: float
    gap: float  # (objective - lower_bound) / |objective|
    status: Status
    reason: str
    seconds: float
    history: tuple[HistoryPoint, ...] = field(default=())


def relative_gap(objective: float, bound: float) -> float:
    return max(0.0, objective - bound) / max(abs(objective), 1e-300)


def proven(
    problem: SelectionProblem, x: np.ndarray, bound: float, gap: float, started: float, history: tuple[HistoryPoint, ...] = ()
) -> Solution:
    """A selection with its bound, scored anew. started: ``time.perf_counter()`` at the start; an AssertionError where it does not hold."""
    score = problem.evaluate(x)
    assert score.feasible, f"the selection does not hold: {score.reason}"
    bound = float(min(bound, score.objective))
    relative = relative_gap(score.objective, bound)
    return Solution(
        selection=x,
        objective=score.objective,
        lower_bound=bound,
        gap=relative,
        status="optimal" if relative <= max(gap, ROUNDING) else "feasible",
        reason="",
        seconds=time.perf_counter() - started,
        history=history,
    )


def infeasible(reason: str, started: float, bound: float = math.inf) -> Solution:
    """No selection, and why; ``bound`` is finite where that is not proven."""
    return Solution(
        selection=np.zeros(0, dtype=np.int64),
        objective=math.inf,
        lower_bound=bound,
        gap=math.inf,
        status="infeasible",
        reason=reason,
        seconds=time.perf_counter() - started,
    )
