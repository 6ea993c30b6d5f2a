"""The solver's entry point: ``solve(problem)`` runs the phases and answers in the terms of the original problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..problem import SelectionProblem
from .exact import Mip
from .model import Model, from_problem

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


Progress = Callable[[HistoryPoint], None]


def solve(
    problem: SelectionProblem,
    *,
    time_limit_s: float = 60.0,
    gap: float = 1e-4,
    seed: int = 0,
    work_limit: int | None = None,
    progress: Progress | None = None,
) -> Solution:
    """Best selection found within ``time_limit_s``, stopping early at a relative ``gap`` to the proven bound."""
    started = time.perf_counter()
    empty = np.flatnonzero(problem.num_strategies == 0)
    if len(empty):
        return _infeasible(f"node {int(empty[0])} has no strategy", started)
    model = from_problem(problem)
    reason = _least_memory(problem, model)
    if reason:
        return _infeasible(reason, started)
    result = Mip(model).solve(started + time_limit_s, gap / 2, seed, work_limit)
    if result.infeasible:
        return _infeasible(_why_infeasible(problem, model), started)
    seconds = time.perf_counter() - started
    if result.selection is None:
        return _infeasible(f"no selection found within {time_limit_s:g} s (not proven infeasible)", started)
    objective = problem.evaluate(result.selection).objective
    bound = min(result.lower_bound, objective)
    relative = (objective - bound) / max(abs(objective), 1e-300) if objective > bound else 0.0
    point = HistoryPoint(seconds=seconds, objective=objective, lower_bound=bound)
    if progress:
        progress(point)
    return Solution(
        selection=result.selection,
        objective=objective,
        lower_bound=bound,
        gap=relative,
        status="optimal" if relative <= gap else "feasible",
        reason="",
        seconds=seconds,
        history=(point,),
    )


def _infeasible(reason: str, started: float) -> Solution:
    return Solution(
        selection=np.zeros(0, dtype=np.int64),
        objective=math.inf,
        lower_bound=math.inf if "not proven" not in reason else -math.inf,
        gap=math.inf,
        status="infeasible",
        reason=reason,
        seconds=time.perf_counter() - started,
    )


def _least_memory(problem: SelectionProblem, model: Model) -> str:
    """Why even the smallest choices do not fit, or nothing."""
    least = model.least_loads()
    over = least - model.slot_limit
    if not (over > 0).any():
        return ""
    return _memory_reason(problem, model, int(over.argmax()), float(least[over.argmax()]))


def _memory_reason(problem: SelectionProblem, model: Model, slot: int, least: float) -> str:
    pool = int(model.slot_pool[slot])
    limit = problem.limits[pool]
    return f"pool {problem.pools[pool]!r} needs at least {least:.0f} bytes at time {model.slot_time[slot]}, its limit is {limit:.0f}"


def _why_infeasible(problem: SelectionProblem, model: Model) -> str:
    if model.num_slots == 0:
        return "no selection avoids all forbidden entries"
    least = model.least_loads()
    slot = int((least / np.maximum(model.slot_limit, 1.0)).argmax())
    pressed = _memory_reason(problem, model, slot, float(least[slot]))
    return f"no selection avoids all forbidden entries and fits memory at every time; tightest: {pressed}"
