"""The solver's entry point: ``solve(problem)`` runs the phases and answers in the terms of the original problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..problem import SelectionProblem
from .model import Model, from_problem
from .presolve import presolve
from .run import ROUNDING, Run, relative_gap
from .substitute import drop_slots

NOT_PROVEN = "not proven infeasible"

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


def proven(problem: SelectionProblem, x: np.ndarray, bound: float, gap: float, started: float) -> Solution:
    """A selection with its bound, scored anew. started: ``time.perf_counter()`` at the start; an AssertionError where it does not hold."""
    score = problem.evaluate(x)
    assert score.feasible, f"the selection does not hold: {score.reason}"
    bound = float(min(bound, score.objective))
    relative = (score.objective - bound) / max(abs(score.objective), 1e-300) if score.objective > bound else 0.0
    return Solution(
        selection=x,
        objective=score.objective,
        lower_bound=bound,
        gap=relative,
        status="optimal" if relative <= gap else "feasible",
        reason="",
        seconds=time.perf_counter() - started,
    )


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
    problem.verify()
    empty = np.flatnonzero(problem.num_strategies == 0)
    if len(empty):
        return _infeasible(f"node {int(empty[0])} has no strategy", started)
    model = from_problem(problem)
    reason = _least_memory(problem, model)
    if reason:
        return _infeasible(reason, started)
    reducing = time.perf_counter()
    reduced = presolve(drop_slots(model))
    reduction_s = time.perf_counter() - reducing
    if reduced.infeasible:
        return _infeasible(_why_infeasible(problem, model), started)
    history = _History(started, progress)
    deadline, whole = started + time_limit_s, _whole(problem)
    run = Run(reduced.model, deadline, gap, seed, whole, lambda: history.add(run.objective, run.bound), reduction_s)
    run.execute(work_limit)
    if run.infeasible:
        return _infeasible(_why_infeasible(problem, model), started)
    if run.x is None:
        return _infeasible(f"no selection found within {time_limit_s:g} s ({NOT_PROVEN})", started, run.bound)
    return _answer(problem, reduced.undo(run.x), run.bound, gap, history)


def _answer(problem: SelectionProblem, selection: np.ndarray, bound: float, gap: float, history: _History) -> Solution:
    check = problem.evaluate(selection)
    assert check.feasible, f"the solver's answer is not feasible: {check.reason}"
    bound = min(bound, check.objective)
    relative = relative_gap(check.objective, bound)
    return Solution(
        selection=selection,
        objective=check.objective,
        lower_bound=bound,
        gap=relative,
        status="optimal" if relative <= max(gap, ROUNDING) else "feasible",
        reason="",
        seconds=time.perf_counter() - history.started,
        history=tuple(history.points),
    )


class _History:
    """Collects improvements and passes them on."""

    def __init__(self, started: float, progress: Progress | None) -> None:
        self.started, self.progress = started, progress
        self.points: list[HistoryPoint] = []

    def add(self, objective: float, lower_bound: float) -> None:
        seconds = time.perf_counter() - self.started
        point = HistoryPoint(seconds=seconds, objective=objective, lower_bound=min(lower_bound, objective))
        self.points.append(point)
        if self.progress:
            self.progress(point)


def _whole(problem: SelectionProblem) -> bool:
    """All costs that can be chosen are whole numbers, and no stream adds to them."""
    if problem.streams:
        return False
    costs = (problem.node_cost, problem.edge_cost)
    return all(bool(np.all(np.floor(c) == c)) for c in costs)


def _infeasible(reason: str, started: float, bound: float = math.inf) -> Solution:
    return Solution(
        selection=np.zeros(0, dtype=np.int64),
        objective=math.inf,
        lower_bound=bound,
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
