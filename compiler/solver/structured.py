"""Problems of the planner: long, narrow graphs with a few binding memory slots and streams, solved to proof.

Statement
    The problem of ``problem.py`` in the form of ``model.py``. Any lower bound of ``chain_dual`` holds for it, and a selection that costs
    less than ``upper`` uses no strategy or pair whose exclusive bound is ``upper`` or more (``marginals``), so forbidding those keeps
    all selections better than the best one known.
Rounds
    1. raise the bound by prices and weights; selections met on the way that fit are candidates; where they are far from the bound, local
       search (``improve``) and exact solutions of what a cutoff just above the bound leaves;
    2. where much is still open, branch and bound on the same dual (``chain_branch``);
    3. forbid what no better selection uses, reduce (``presolve``), which also moves loads and costs that are now fixed into constants;
    4. a small remainder goes to the exact solver: if it has nothing better, the best one known is optimal.
    A round that forbids little makes the next one branch; two of them end the loop.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..problem import SelectionProblem
from .chain_branch import EXACT_ENTRIES, Search, solve_exactly
from .chain_dual import Dual, Point, slot_usage
from .graph import build_flows, build_graph, build_rows
from .improve import Incumbent, Searcher
from .model import Model, from_problem
from .presolve import Reduced, presolve
from .substitute import drop_slots

if TYPE_CHECKING:
    from .solve import Solution

MOST_NODES, MOST_ENTRIES = 6_000, 6_000_000
SHRINK_GAP = 0.005
"""Relative gap above which too little would be forbidden: branch first."""

MOST_SPLITS = 400
"""Parts of the branch and bound that are split at most."""

WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Stream weights at which strategies are tested besides the best point: what loads a stream far too much shows at high ones."""


MOVES_PER_NODE, HOT = 5, 0.03
"""Of the local search: moves per node of the model, starting noise in units of cost per node."""


FIRST_SLACK, WIDEN, PROBE_SHARE = 0.05, 4.0, 0.2
"""Of the probes: the first cutoff above the bound in units of the gap, its growth, the share of the time left for each."""


class Structured:
    """One solve. ``x`` is in terms of ``model``."""

    def __init__(self, model: Model, deadline: float, gap: float, seed: int) -> None:
        self.model, self.deadline, self.gap, self.seed = model, deadline, gap, seed
        self.reduced = Reduced(model)
        self.x: np.ndarray | None = None
        self.objective, self.bound = math.inf, -math.inf
        self.infeasible = False

    def run(self) -> None:
        if not self._reduce(drop_slots(self.model)):
            return
        stalled = False
        while not self.done():
            entries = self._entries()
            dual = self._raise()
            if not self.done() and (stalled or self._relative() > SHRINK_GAP):
                self._press(dual)
            if self.done() or self._impossible(dual, dual.bound):
                return
            if (stalled or self._relative() > SHRINK_GAP) and self._search(dual):
                return
            if not self._shrink(dual):
                return
            if self._entries() <= EXACT_ENTRIES:
                self._exact()
                return
            if stalled and self._entries() > 0.7 * entries:
                return
            stalled = self._entries() > 0.7 * entries

    def _entries(self) -> int:
        return int(np.isfinite(self.reduced.model.edge_cost).sum())

    def _impossible(self, dual: Dual, bound: float) -> bool:
        self.infeasible = self.x is None and bound > dual.ceiling
        return self.infeasible

    def _relative(self) -> float:
        return (self.objective - self.bound) / max(abs(self.objective), 1e-300) if self.objective < math.inf else math.inf

    def _search(self, dual: Dual) -> bool:
        """Branch and bound on the current model; True if there is no more to gain."""
        search = Search(dual, self.gap, self.seed)
        search.run(MOST_SPLITS)
        self.bound = max(self.bound, min(search.bound, self.objective))
        return self._impossible(dual, search.bound) or self.done()

    def done(self) -> bool:
        met = self.objective - self.bound <= self.gap * abs(self.objective) if self.objective < math.inf else False
        return met or time.perf_counter() > self.deadline

    def _offer(self, x: np.ndarray, objective: float) -> None:
        if objective < self.objective:
            self.objective, self.x = objective, self.reduced.undo(x.copy())

    def _reduce(self, model: Model) -> bool:
        """Reduce ``model`` and make it current; False if that decided the problem."""
        more = presolve(model)
        self.reduced = Reduced(more.model, self.reduced.steps + more.steps, more.infeasible)
        if more.infeasible or (more.model.slot_limit < 0).any():
            self.infeasible = self.x is None
            self.bound = self.objective
            return False
        if more.model.num_nodes == 0:
            x = np.zeros(0, dtype=np.int64)
            self._offer(x, more.model.objective(x))
            self.bound = self.objective
            return False
        return True

    def _raise(self) -> Dual:
        dual = Dual(self.reduced.model, self._offer, self.deadline, self.seed)
        dual.upper = self.objective
        dual.ascend(0.5 * self.gap, 60)
        self.bound = max(self.bound, min(dual.bound, self.objective))
        return dual

    def _press(self, dual: Dual) -> None:
        """Better selections than the dual meets by itself: local search, then exact solutions just above the bound."""
        self._improve(dual, min(dual.cuts, key=lambda cut: dual.value(dual.best, cut)).x)
        dual.ascend(0.5 * self.gap, 60, dual.cuts[-20:])  # the first ascent ends early where it knows no fair selection
        self.bound = max(self.bound, min(dual.bound, self.objective))
        if not self.done() and self._probe(dual) and dual.chosen is not None and not self.done():
            self._improve(dual, dual.chosen)

    def _probe(self, dual: Dual) -> bool:
        """Guess a cutoff just above the bound, forbid what no selection below it uses, solve the rest exactly; then a wider one.

        Whatever is found is a selection of the whole, and none below the cutoff is lost: the exact bound, up to the cutoff, holds.
        Ends with the first cutoff that is neither proven empty nor brings a better selection; True if one was found.
        """
        slack, before = FIRST_SLACK * self.gap * abs(dual.bound), self.objective
        while not self.done() and dual.bound + slack < self.objective:
            cutoff = dual.bound + slack
            reduced = presolve(dual.forbid([dual.best], cutoff))
            bound, last = math.inf, self.objective
            if not reduced.infeasible and not (reduced.model.slot_limit < 0).any():
                if np.isfinite(reduced.model.edge_cost).sum() > EXACT_ENTRIES:
                    break
                now = time.perf_counter()
                x, bound = solve_exactly(reduced.model, now + PROBE_SHARE * (self.deadline - now), 0.25 * self.gap, self.seed)
                if x is not None:
                    dual.cut(reduced.undo(x))
            self.bound = max(self.bound, min(bound, cutoff, self.objective))
            if bound < cutoff and self.objective == last:
                break
            slack *= WIDEN
        return self.objective < before

    def _improve(self, dual: Dual, start: np.ndarray) -> None:
        """Local search from ``start`` under the true limits and streams; what fits goes to the dual, which offers it."""
        model, point = self.reduced.model, dual.best
        graph, price = build_graph(model, point.weight), np.zeros(model.num_slots)
        for k, p in zip(dual.slots, point.price, strict=False):
            price[k] += p / dual.unit[k]
        unit = max(abs(self.bound), 1e-300) / model.num_nodes
        searcher = Searcher(graph, build_rows(model), build_flows(model, point.weight), self.seed, unit)
        moves = MOVES_PER_NODE * model.num_nodes
        found = searcher.descend(Incumbent(start, math.inf, price), moves, self.deadline)
        again = searcher.settle(found, HOT * unit, moves, 30, self.deadline)
        for x in (found.x, again.x):
            dual.cut(x)

    def _shrink(self, dual: Dual) -> bool:
        if self.objective == math.inf:
            return True
        points = [dual.best]
        for s in range(self.reduced.model.num_streams):
            points += [Point(dual.best.price, _unit(self.reduced.model.num_streams, s) * w) for w in WEIGHTS]
        return self._reduce(dual.forbid(points, self.objective))

    def _exact(self) -> None:
        x, bound = solve_exactly(self.reduced.model, self.deadline, 0.5 * self.gap, self.seed)
        self.infeasible = self.x is None and bound == math.inf
        if x is not None:
            self._offer(x, self.reduced.model.objective(x))
        self.bound = max(self.bound, min(bound, self.objective))


def solve_structured(problem: SelectionProblem, *, time_limit_s: float = 60.0, gap: float = 1e-4, seed: int = 0) -> Solution | None:
    """A solution with its bound, or None if the problem is not of this kind or nothing was found and nothing proven."""
    from .solve import Solution, proven

    started = time.perf_counter()
    if problem.num_nodes > MOST_NODES or len(problem.edge_cost) > MOST_ENTRIES or (problem.num_strategies == 0).any():
        return None
    run = Structured(from_problem(problem), started + time_limit_s, gap, seed)
    run.run()
    if run.infeasible:
        return Solution(
            selection=np.zeros(0, dtype=np.int64),
            objective=math.inf,
            lower_bound=math.inf,
            gap=math.inf,
            status="infeasible",
            reason=_why_infeasible(problem, run.model, run.deadline, seed),
            seconds=time.perf_counter() - started,
        )
    if run.x is None:
        return None
    return proven(problem, run.x, run.bound, gap, started)


def _why_infeasible(problem: SelectionProblem, model: Model, deadline: float, seed: int) -> str:
    """The slot that cannot be met, with the least bytes any selection needs there; or what else is known."""
    if model.num_slots == 0:
        return "no selection avoids all forbidden entries"
    least = model.least_loads()
    order = np.argsort(-(least - model.slot_limit) / np.maximum(model.slot_limit, 1.0), kind="stable")
    for k in _apart(order, 10):
        if least[k] <= model.slot_limit[k]:
            least[k] = max(least[k], least_load(model, k, min(deadline, time.perf_counter() + 1.0), seed))
        if least[k] > model.slot_limit[k]:
            return _at_slot(problem, model, k, float(least[k]))
    k = int(order[0])
    tightest = _at_slot(problem, model, k, float(least[k]))
    return f"no selection avoids all forbidden entries and fits memory at every time; tightest: {tightest}"


def _at_slot(problem: SelectionProblem, model: Model, k: int, least: float) -> str:
    pool = int(model.slot_pool[k])
    limit = problem.limits[pool]
    return f"pool {problem.pools[pool]!r} needs at least {least:.0f} bytes at time {model.slot_time[k]}, its limit is {limit:.0f}"


def _apart(order: np.ndarray, most: int) -> list[int]:
    """The first entries of ``order`` that are no neighbours of each other."""
    picked: list[int] = []
    for k in order.tolist():
        if all(abs(k - other) > 3 for other in picked):
            picked.append(k)
        if len(picked) == most:
            break
    return picked


def least_load(model: Model, k: int, deadline: float, seed: int) -> float:
    """A lower bound on the bytes of slot ``k`` over all selections without forbidden entries: the dual with bytes as costs."""
    unit = max(float(model.slot_limit[k]), 1.0)
    bytes_of = slot_usage(model, k) / unit
    weightless = replace(
        model,
        cost=np.where(np.isfinite(model.cost), bytes_of, np.inf),
        edge_cost=np.where(np.isfinite(model.edge_cost), 0.0, np.inf),
        node_stream=np.zeros((0, len(model.cost))),
        edge_stream=np.zeros((0, len(model.edge_cost))),
        stream_constant=np.zeros(0),
        constant=0.0,
    )
    dual = Dual(weightless, lambda x, objective: None, deadline, seed)
    dual.trial(dual.best, 50, 1e-9, 1e-6)
    return max(0.0, (dual.bound - 1e-9) * unit)


def _unit(size: int, at: int) -> np.ndarray:
    out = np.zeros(size)
    out[at] = 1.0
    return out
