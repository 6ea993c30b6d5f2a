"""Problems of the planner: long, narrow graphs with a few binding memory slots and streams, solved to proof.

Statement
    The problem of ``problem.py`` in the form of ``model.py``. Any lower bound of ``chain_dual`` holds for it, and a selection that costs
    less than ``upper`` uses no strategy or pair whose exclusive bound is ``upper`` or more (``marginals``), so forbidding those keeps
    all selections better than the best one known.
Rounds
    1. raise the bound by prices and weights, equal nodes folded into one (``fold``); selections met on the way that fit are candidates;
       with several streams, or where they are far from the bound, exact solutions of what a cutoff just above the bound leaves (by the
       engine for places where that is much), and local search (``improve``);
    2. where much is still open, branch and bound on the same dual (``chain_branch``);
    3. forbid what no better selection uses, reduce (``presolve``), which also moves loads and costs that are now fixed into constants;
    4. a small remainder goes to the exact solver: if it has nothing better, the best one known is optimal.
    A round that forbids little makes the next one branch; two of them end the loop.
"""

from __future__ import annotations

import math
import time

import numpy as np

from . import places
from .chain_branch import EXACT_ENTRIES, Search, solve_exactly
from .chain_dual import Dual, Point
from .graph import build_flows, build_graph, build_rows
from .improve import Incumbent, Searcher
from .model import Model
from .presolve import Reduced, presolve
from .start import Offer, Outcome, Start

MOST_NODES, MOST_ENTRIES = 6_000, 6_000_000
SHRINK_GAP = 0.005
"""Relative gap above which too little would be forbidden: branch first."""

MOST_SPLITS = 400
"""Parts of the branch and bound that are split at most."""

WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Stream weights at which strategies are tested besides the best point: what loads a stream far too much shows at high ones."""


PLACES_ENTRIES = 200_000
"""Finite edge entries up to which a remainder with several streams goes to the engine for places."""

MOVES_PER_NODE, HOT = 5, 0.03
"""Of the local search: moves per node of the model, starting noise in units of cost per node."""


FIRST_SLACK, LEAST_SLACK, WIDEN, PROBE_SHARE = 0.05, 1e-9, 4.0, 0.2
"""Of the probes: the first cutoff above the bound in units of the gap and at least, relative, where the gap is next to nothing, its growth,
the share of the time left for each."""


class Structured:
    """One solve. ``x`` is in terms of the problem."""

    def __init__(self, reduced: Reduced, deadline: float, gap: float, seed: int, offer: Offer) -> None:
        self.reduced, self.deadline, self.gap, self.seed = reduced, deadline, gap, seed
        self.report = offer
        self.x: np.ndarray | None = None
        self.objective, self.bound = math.inf, -math.inf
        self.infeasible = False

    def run(self) -> None:
        if not self._take(self.reduced):
            return
        stalled = False
        while not self.done():
            entries = self._entries()
            dual = self._raise()
            if not self.done() and self.reduced.model.num_streams > 1:
                self._probe(dual)
            if self.infeasible:
                return
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
            if stalled and self._entries() >= 0.7 * entries:
                return
            stalled = self._entries() >= 0.7 * entries

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

    def _target(self) -> float:
        """What a selection may cost so that it is within the gap of the bound."""
        return self.bound + self.gap / (1 + self.gap) * abs(self.bound)

    def _offer(self, x: np.ndarray, objective: float) -> None:
        if objective < self.objective:
            self.objective, self.x = objective, self.reduced.undo(x.copy())
            self.report(objective, self.bound)

    def _reduce(self, model: Model) -> bool:
        """Reduce ``model`` and make it current; False if that decided the problem."""
        more = presolve(model)
        return self._take(Reduced(more.model, self.reduced.steps + more.steps, more.infeasible))

    def _take(self, more: Reduced) -> bool:
        self.reduced = more
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
        dual = Dual(self.reduced.model, self._offer, self.deadline, self.seed, folded=True)
        dual.upper = self.objective
        dual.ascend(0.5 * self.gap, 60)
        dual.unfold()
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
        slack, before = max(FIRST_SLACK * self.gap * abs(dual.bound), LEAST_SLACK * max(abs(dual.bound), LEAST_SLACK)), self.objective
        while not self.done():
            cutoff = min(dual.bound + slack, self.objective)
            reduced = presolve(dual.forbid([dual.best], cutoff))
            bound, last = math.inf, self.objective
            if not reduced.infeasible and not (reduced.model.slot_limit < 0).any():
                if not _is_small(reduced.model):
                    break
                x, bound = self._rest(reduced.model)
                if x is not None:
                    dual.cut(reduced.undo(x))
            self.bound = max(self.bound, min(bound, cutoff, self.objective))
            if cutoff == last or (bound < cutoff and self.objective == last):
                break
            if cutoff > dual.ceiling:  # and nothing is left below it
                self.infeasible = self.x is None
                break
            slack *= WIDEN
        return self.objective < before

    def _rest(self, model: Model) -> tuple[np.ndarray | None, float]:
        """A selection of what a probe leaves, and its bound; none and infinity where there is none."""
        now = time.perf_counter()
        deadline = now + PROBE_SHARE * (self.deadline - now)
        if np.isfinite(model.edge_cost).sum() <= EXACT_ENTRIES:
            return solve_exactly(model, deadline, 0.25 * self.gap, self.seed, self._target())
        run = places.Places(Reduced(model), deadline, 0.25 * self.gap, self.seed, lambda objective, bound: None)
        run.run()
        return run.x, math.inf if run.infeasible else run.bound

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
        x, bound = solve_exactly(self.reduced.model, self.deadline, 0.5 * self.gap, self.seed, self._target())
        self.infeasible = self.x is None and bound == math.inf
        if x is not None:
            self._offer(x, self.reduced.model.objective(x))
        self.bound = max(self.bound, min(bound, self.objective))


def solve_structured(start: Start, deadline: float, gap: float, seed: int, offer: Offer) -> Outcome:
    """A selection with its bound; neither where none is found by ``deadline``."""
    run = Structured(start.reduced, deadline, gap, seed, offer)
    run.run()
    return Outcome(run.x, run.bound, run.infeasible)


def fits(model: Model) -> bool:
    """Whether a reduced model is of this kind. Without streams the general engine's bound is as good, and its search is made for that."""
    return model.num_streams > 0 and model.num_nodes <= MOST_NODES and len(model.edge_cost) <= MOST_ENTRIES


def _is_small(model: Model) -> bool:
    """Whether a remainder goes to the exact solver, or to the engine for places."""
    entries = int(np.isfinite(model.edge_cost).sum())
    return entries <= EXACT_ENTRIES or (places.fits(model) and entries <= PLACES_ENTRIES)


def _unit(size: int, at: int) -> np.ndarray:
    out = np.zeros(size)
    out[at] = 1.0
    return out
