"""The general engine: quick start, exact where small, cycles of search beside dual ascent (``run``) on the reduced model."""

from __future__ import annotations

import numpy as np

from ..problem import SelectionProblem
from .run import Run
from .start import Offer, Outcome, Start


def solve_general(start: Start, deadline: float, gap: float, seed: int, offer: Offer, work_limit: int | None = None) -> Outcome:
    """Whatever the problem: a selection if one is found by ``deadline``, and a bound."""
    whole = _whole(start.problem)
    run = Run(start.reduced.model, deadline, gap, seed, whole, lambda: offer(run.objective, run.bound), start.reduction_s)
    run.execute(work_limit)
    return Outcome(None if run.x is None else start.reduced.undo(run.x), run.bound, run.infeasible)


def _whole(problem: SelectionProblem) -> bool:
    """All costs that can be chosen are whole numbers, and no stream adds to them."""
    if problem.streams:
        return False
    costs = (problem.node_cost, problem.edge_cost)
    return all(bool(np.all(np.floor(c) == c)) for c in costs)
