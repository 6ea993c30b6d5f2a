"""The solver's entry point: ``solve(problem)`` reduces the problem, runs the engines that fit it and answers in the problem's terms."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np

from ..problem import ProblemBuilder, SelectionProblem
from . import places, structured
from .general import solve_general
from .model import Model
from .reasons import least_memory, why_infeasible
from .solution import ROUNDING, HistoryPoint, Solution, infeasible, proven, relative_gap
from .start import Outcome, Start, reduced_start

NOT_PROVEN = "not proven infeasible"

Progress = Callable[[HistoryPoint], None]
EngineName = Literal["auto", "general", "structured", "places"]
ENGINES: tuple[EngineName, ...] = ("places", "structured", "general")

STRUCTURED_SHARE, STRUCTURED_S = 0.2, 10.0
"""Of the time left, for the structured engine before the general one: this share, or these seconds if they are no more than half of it."""


def solve(
    problem: SelectionProblem,
    *,
    time_limit_s: float = 60.0,
    gap: float = 1e-4,
    enough: float = 0.0,
    seed: int = 0,
    work_limit: int | None = None,
    progress: Progress | None = None,
    engine: EngineName = "auto",
) -> Solution:
    """Best selection found within ``time_limit_s``, stopping early at a relative ``gap`` to the proven bound.

    ``enough``: a larger gap from which on only what is under way goes on: the places engine begins no further integer program, and no other
    engine is tried. The last tenth of a per cent of a problem full of knapsacks costs ten times what was spent before.
    ``engine``: that one alone; "auto": those that fit the problem, one after the other until the gap is met. ``work_limit``: most rounds of
    the general engine. Raises ValueError for a malformed problem or an unknown engine.
    """
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; the engines are 'auto', {', '.join(map(repr, ENGINES))}")
    started = time.perf_counter()
    problem.verify()
    empty = np.flatnonzero(problem.num_strategies == 0)
    if len(empty):
        return infeasible(f"node {int(empty[0])} has no strategy", started)
    start = reduced_start(problem)
    reason = least_memory(problem, start.model)
    if reason:
        return infeasible(reason, started)
    best = _Best(started, gap, progress, enough)
    if start.reduced.infeasible:
        best.outcome = Outcome(None, math.inf, infeasible=True)
    else:
        _run_engines(start, engine, best, started + time_limit_s, seed, work_limit)
    found = best.outcome
    if found.infeasible:
        return infeasible(found.reason or why_infeasible(problem, start.model, started + time_limit_s, seed), started)
    if found.selection is None:
        return infeasible(f"no selection found within {time_limit_s:g} s ({NOT_PROVEN})", started, found.bound)
    return proven(problem, found.selection, found.bound, gap, started, tuple(best.history))


def _run_engines(start: Start, engine: EngineName, best: _Best, deadline: float, seed: int, work_limit: int | None) -> None:
    for name in _fitting(start.reduced.model) if engine == "auto" else (engine,):
        left = deadline - time.perf_counter()
        if name == "places":
            outcome = places.solve_places(start, deadline, best.gap, seed, best.offer, best.enough)
        elif name == "structured":
            spared = left - max(STRUCTURED_SHARE * left, min(STRUCTURED_S, 0.5 * left)) if engine == "auto" else 0.0
            outcome = structured.solve_structured(start, deadline - spared, best.gap, seed, best.offer)
        else:
            outcome = solve_general(start, deadline, best.gap, seed, best.offer, work_limit)
        best.take(outcome, start.problem)
        if best.settled() or time.perf_counter() > deadline:
            return


def _fitting(model: Model) -> list[EngineName]:
    """The engines for a reduced model, the most special first."""
    fits = {"places": places.fits(model), "structured": structured.fits(model), "general": True}
    first: tuple[EngineName, ...] = ENGINES if len(model.edge_cost) <= structured.PLACES_ENTRIES else ("structured", "places", "general")
    return [name for name in first if fits[name]]


class _Best:
    """The best of what the engines found, and the history of objective and bound over all of them."""

    def __init__(self, started: float, gap: float, progress: Progress | None, enough: float) -> None:
        self.started, self.gap, self.progress, self.enough = started, gap, progress, max(enough, gap)
        self.outcome = Outcome(None, -math.inf)
        self.objective = self.offered = math.inf
        self.bound = -math.inf
        self.history: list[HistoryPoint] = []

    def offer(self, objective: float, bound: float) -> None:
        """An engine's objective and bound; what improves on all before becomes a point of the history."""
        bound = max(bound, self.bound)
        if objective >= self.offered and bound <= self.bound:
            return
        self.offered, self.bound = min(objective, self.offered), bound
        point = HistoryPoint(seconds=time.perf_counter() - self.started, objective=self.offered, lower_bound=min(bound, self.offered))
        self.history.append(point)
        if self.progress:
            self.progress(point)

    def take(self, outcome: Outcome, problem: SelectionProblem) -> None:
        """An engine has ended: keep the better selection, the higher bound, and any proof that there is none."""
        selection, bound = self.outcome.selection, max(self.outcome.bound, outcome.bound)
        if outcome.selection is not None:
            objective = problem.evaluate(outcome.selection).objective
            if objective < self.objective:
                self.objective, selection = objective, outcome.selection
        self.offer(self.objective, bound)
        self.outcome = Outcome(selection, bound, outcome.infeasible and selection is None, outcome.reason)

    def settled(self) -> bool:
        """Nothing is left to find within the gap."""
        met = self.objective < math.inf and relative_gap(self.objective, self.bound) <= max(self.enough, ROUNDING)
        return met or self.outcome.infeasible


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Load (and on a machine's first use compile) the kernels that the planner's problems begin with, so that no time limit pays for it.

    Not those of the general engine's search, see `warm_up_search`.
    """
    builder = ProblemBuilder(pools={"device": 10.0}, streams=("side",))
    nodes = [builder.add_node([1.0, 2.0, 3.0], [[-1.0, 0.0, 0.0]]) for _ in range(5)]
    for a, b in itertools.pairwise(nodes):
        builder.add_edge(a, b, np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0], [5.0, 6.0, 0.0]]), [np.ones((3, 3))])
    for i, node in enumerate(nodes):
        builder.add_usage(node, "device", i, i + 3, [8.0, 3.0, 2.0])
    problem = builder.build()
    for engine in ENGINES:
        solve(problem, time_limit_s=600.0, gap=0.0, work_limit=1, engine=engine)


@lru_cache(maxsize=1)
def warm_up_search() -> None:
    """The same for the search in large problems: 1.5 s, and some 15 s where the kernels have to be compiled."""
    rng, num_nodes, size = np.random.default_rng(0), 400, 16
    builder = ProblemBuilder(pools={"device": 3.0 * num_nodes})
    for n in range(num_nodes):
        builder.add_usage(builder.add_node(rng.random(size)), "device", n, n + num_nodes // 4, 20.0 * rng.random(size))
        for back in (1, 7, 31):
            if n >= back:
                builder.add_edge(n - back, n, rng.random((size, size)))
    solve(builder.build(), time_limit_s=600.0, gap=1e-3, work_limit=1, engine="general")
