"""The phases of one solve on the reduced model: quick start, exact where small, cycles of search beside dual ascent.

Two threads at most: while one searches, the other raises the bound or searches too (the kernels release the interpreter lock). Rounds
are synchronous, so the result depends on the seed and the number of rounds, not on how the threads were scheduled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .combine import Pool, combine
from .exact import ExactResult, Mip
from .forest import energy
from .graph import build_flows
from .improve import Incumbent, Searcher
from .lagrange import Dual
from .model import Model
from .presolve import presolve
from .solution import ROUNDING, relative_gap
from .substitute import keep_strategies, substitute

EXACT_ENTRIES = 150_000
"""Finite edge entries up to which the whole remainder goes to the exact solver."""

QUICK_ITERATIONS, SECOND_ITERATIONS, ROUND_ITERATIONS, MOST_ITERATIONS = 130, 400, 250, 1500
EXACT_ROUNDS = (3, 8)
"""Rounds after which fixing by bounds and the exact solver are tried again."""

QUICK_MOVES = 4000
HOT = (0.1, 0.3, 0.03, 1.0)
"""Starting noise of successive cycles from the best selection, in units of energy per node."""

FRESH_HOT = 0.1
"""The same for cycles from the prices of the bound."""

CYCLE_STEPS, CYCLE_MOVES = 200, 15_000

KICKS, KICK_HOT = 300, 0.03
"""Forced changes after a cycle, and their noise in the same units."""

COMBINE_FROM, COMBINE_S, COMBINE_SHARE = 4, 10.0, 0.1
"""Recombination: new selections that make it worth while, most seconds, and most of the time left."""
LEAST_GAP = 1e-5
"""To which a recombination is solved."""

Report = Callable[[], None]


class _StreamWeights:
    """Ascent on the streams' weights (>= 0, sum <= 1), fed with the bound of each trial.

    One stream: the bound is concave in its weight, so halving from 1/2 brackets the best one and thirds refine it. Several: multiplicative
    weights with a "none" entry, driven by the stream loads of the minimiser (a supergradient).
    """

    def __init__(self, num: int, first_bound: float) -> None:
        self.tried = {0.0: first_bound}
        self.weight, self.num = np.zeros(num), num
        self.score, self.largest = np.zeros(num + 1), 1e-300

    def next(self, loads: np.ndarray) -> np.ndarray:
        """``loads``: seconds on each stream at the last minimiser."""
        if self.num == 1:
            self.weight = np.array([self._next_single()])
            return self.weight
        padded = np.append(loads, 0.0)
        self.largest = max(self.largest, float(np.abs(padded).max()))
        self.score += 2.0 / math.sqrt(len(self.tried)) * padded / self.largest
        self.tried[float(len(self.tried))] = 0.0
        scaled = np.exp(self.score - self.score.max())
        return (scaled / scaled.sum())[:-1]

    def record(self, bound: float) -> None:
        if self.num == 1:
            self.tried[float(self.weight[0])] = bound

    def _next_single(self) -> float:
        ordered = sorted(self.tried)
        best = max(ordered, key=lambda w: self.tried[w])
        smallest = ordered[1] if len(ordered) > 1 else 1.0
        if best <= smallest and smallest > 1e-3:
            return smallest / 2
        at = ordered.index(best)
        below, above = ordered[max(at - 1, 0)], ordered[min(at + 1, len(ordered) - 1)]
        return (best + above) / 2 if above - best > best - below else (best + below) / 2


class Run:
    """State of one solve: the best selection of ``model``, its objective and the proven bound."""

    def __init__(self, model: Model, deadline: float, gap: float, seed: int, whole: bool, report: Report, reduction_s: float) -> None:
        self.model, self.deadline, self.gap, self.seed = model, deadline, gap, seed
        self.whole = whole  # all costs are integers: bounds can be rounded up
        self.report = report
        self.reduction_s = reduction_s  # what the first reduction took: there is no other one with less time than that left
        self.x: np.ndarray | None = None
        self.objective, self.bound = math.inf, -math.inf
        self.infeasible = False
        self.settled = False  # the exact solver has finished: nothing more to find within the gap
        self.best: Incumbent | None = None
        self.pool = Pool()

    def execute(self, work_limit: int | None) -> None:
        if self.model.num_nodes == 0:
            self.offer(np.zeros(0, dtype=np.int64))
            self.raise_bound(self.objective, exact=True)
            return
        self.quick_start()
        if self.done():
            return
        if np.isfinite(self.model.edge_cost).sum() <= 4 * EXACT_ENTRIES:
            self.exact_phase()
        if self.done() or self.infeasible:
            return
        self.improve(work_limit)

    def done(self) -> bool:
        closed = math.isfinite(self.objective) and relative_gap(self.objective, self.bound) <= max(self.gap, ROUNDING)
        return closed or self.settled or time.perf_counter() >= self.deadline

    def offer(self, x: np.ndarray) -> bool:
        """Take ``x`` if it is feasible and better; report it."""
        objective = self.model.objective(x)
        if not objective < self.objective or (self.model.loads(x) > self.model.slot_limit).any():
            return False
        self.x, self.objective = x.copy(), objective
        self.report()
        return True

    def raise_bound(self, bound: float, exact: bool = False) -> None:
        """Take a better bound, less rounding error; whole-number problems round it up."""
        if not math.isfinite(bound):
            return
        if not exact:
            bound -= 1e-9 * abs(bound)
        if self.whole:
            bound = math.ceil(bound - 1e-6)
        if bound > self.bound:
            self.bound = min(bound, self.objective)
            self.report()

    # ---- phases

    def quick_start(self) -> None:
        """Bounds without prices, then prices, and the first selections."""
        self.dual = Dual(self.model)
        self.dual.run_unpriced(30 if self.model.num_streams else 10, self.deadline)
        self.raise_bound(self.dual.bound)
        magnitude = max(abs(float(energy(self.dual.x, self.dual.graph))), float(np.abs(self.dual.graph.cost).max(initial=0.0)) * 1e-3)
        self.unit = max(magnitude, 1e-300) / self.model.num_nodes
        self.searchers = [self._searcher(self.dual, self.seed * 2 + k) for k in range(2)]
        moves = min(4 * self.model.num_nodes, QUICK_MOVES)
        self.take(self.searchers[0].descend(Incumbent(self.dual.x, math.inf, self.dual.price), moves, self.deadline))
        if self.model.num_streams:
            self.weigh_streams()
        if self.done():
            return
        if self.model.num_slots:
            self.dual.start_prices(magnitude)
        self.dual.run(QUICK_ITERATIONS, self.deadline)
        self.raise_bound(self.dual.bound)
        self.unit = max((self.dual.bound - self.dual.offset) / self.model.num_nodes, self.unit)
        for searcher in self.searchers:
            searcher.unit = self.unit
        self.take(self.searchers[0].descend(Incumbent(self.dual.x, math.inf, self.dual.best_price), moves, self.deadline))

    def weigh_streams(self, rounds: int = 15) -> None:
        """Ascent over the streams' weights, warm-started; keeps the dual with the best bound."""
        weights = _StreamWeights(self.model.num_streams, self.dual.bound)
        best = last = self.dual
        for k in range(rounds):
            last = Dual(self.model, weights.next(self.model.streams(last.x)), last)
            last.run_unpriced(10, self.deadline)
            weights.record(last.bound)
            self.raise_bound(last.bound)
            searcher = self._searcher(last, self.seed + k)
            found = searcher.descend(Incumbent(last.x, math.inf, last.price), 2 * self.model.num_nodes, self.deadline)
            if math.isfinite(found.energy):
                self.offer(found.x)
            if last.bound > best.bound:
                best = last
            if self.done():
                break
        self.dual = best
        self.searchers = [self._searcher(best, self.seed * 2 + k) for k in range(2)]
        self.best = None
        if self.x is not None:
            self.best = Incumbent(self.x.copy(), self.objective - self.model.constant, best.price)

    def _searcher(self, dual: Dual, seed: int) -> Searcher:
        return Searcher(dual.graph, dual.rows, build_flows(self.model, dual.weight), seed, self.unit)

    def take(self, found: Incumbent) -> bool:
        """Keep a searcher's result for the next cycles; offer it as the answer."""
        if not math.isfinite(found.energy):
            return False
        self.offer(found.x)
        self.pool.add(found.energy, found.x)
        if self.best is None or found.energy < self.best.energy:
            self.best = found
            return True
        return False

    def exact_phase(self, share: float = 0.6) -> bool:
        """Fix by bounds, reduce again, and solve exactly if what is left is small; True if that settled it."""
        if self.deadline - time.perf_counter() < 2.0 * self.reduction_s:
            return False
        keep = np.isfinite(self.model.cost)
        upper = math.inf
        if math.isfinite(self.objective):
            upper = self.objective - self.gap / 2 * abs(self.objective)
            keep &= ~self.dual.needless(upper)
            self.raise_bound(self.dual.bound)
        if self.model.num_nodes and not np.logical_or.reduceat(keep, self.model.node_off[:-1]).all():
            self._nothing_better(upper)
            return True
        fixed = keep_strategies(self.model.node_off, keep)
        reduced = presolve(substitute(self.model, fixed))
        if reduced.infeasible:
            self._nothing_better(upper)
            return True
        if int(np.isfinite(reduced.model.edge_cost).sum()) > EXACT_ENTRIES:
            return False
        now = time.perf_counter()
        limit = min(self.deadline - 0.05, now + share * (self.deadline - now))
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(self._solve_exactly, reduced.model, limit)
            result = future.result()
        if result.infeasible:
            self._nothing_better(upper)
            return True
        if result.selection is not None:
            x = fixed.undo(reduced.undo(result.selection))
            self.offer(x)
            start = Incumbent(x, self.model.objective(x) - self.model.constant, self.dual.best_price)
            self.take(self.searchers[0].descend(start, 4 * self.model.num_nodes, self.deadline))
        self.raise_bound(min(result.lower_bound, upper))
        self.settled = result.finished
        return self.done()

    def _solve_exactly(self, model: Model, limit: float) -> ExactResult:
        if model.num_nodes == 0:
            x = np.zeros(0, dtype=np.int64)
            fits = bool((model.slot_limit >= 0).all())
            value = model.objective(x) if fits else math.inf
            return ExactResult(selection=x if fits else None, objective=value, lower_bound=value, infeasible=not fits, finished=True)
        return Mip(model).solve(limit, self.gap / 4, self.seed)

    def _nothing_better(self, upper: float) -> None:
        """Nothing is below ``upper``: with a selection at hand that is a bound, without one the problem is infeasible."""
        if math.isfinite(upper):
            self.raise_bound(upper, exact=True)
            self.settled = True
        else:
            self.infeasible = True

    def improve(self, work_limit: int | None) -> None:
        """Rounds of two jobs until the deadline, the gap or the work limit."""
        quick = self._fresh()
        with ThreadPoolExecutor(max_workers=1) as pool:
            other = pool.submit(self.dual.run, SECOND_ITERATIONS, self.deadline)
            self.take(self.searchers[0].cycle(quick, 0.3 * self.unit, CYCLE_STEPS, CYCLE_MOVES, self.deadline, blocks=True))
            other.result()
            self.raise_bound(self.dual.bound)
            number = 0
            while not self.done() and (work_limit is None or number < work_limit):
                self._round(number, pool)
                number += 1
                if number in EXACT_ROUNDS and not self.done() and self.exact_phase(0.3):
                    break

    def _round(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Two jobs side by side: a cycle, and a recombination, more of the bound, or another cycle."""
        a, b = self.searchers
        other: Future[Any]
        if self.pool.fresh >= COMBINE_FROM:
            now = time.perf_counter()
            limit = min(now + COMBINE_S, now + COMBINE_SHARE * (self.deadline - now))
            other = pool.submit(combine, self.model, self.pool.taken(), limit, max(self.gap / 4, LEAST_GAP), self.seed)
            self.take(self._cycle(a, number))
            self._take_combined(other.result())
        elif self.dual.iterations < MOST_ITERATIONS:
            start = self._fresh()
            other = pool.submit(self.dual.run, ROUND_ITERATIONS, self.deadline)
            self.take(self._cycle(a, number, start))
            other.result()
            self.raise_bound(self.dual.bound)
        else:
            other = pool.submit(self._cycle, b, number, self._fresh())
            found = self._cycle(a, number)
            self.take(other.result())
            self.take(found)

    def _take_combined(self, x: np.ndarray | None) -> None:
        if x is None:
            return
        start = Incumbent(x, self.model.objective(x) - self.model.constant, self._prices())
        found = self.searchers[0].descend(start, 4 * self.model.num_nodes, self.deadline)
        self.take(self._kicked(self.searchers[0], found))

    def _fresh(self) -> Incumbent:
        """Rounding and prices of the bound."""
        return Incumbent(self.dual.x.copy(), math.inf, self.dual.best_price.copy())

    def _prices(self) -> np.ndarray:
        return self.best.price if self.best is not None else self.dual.best_price.copy()

    def _cycle(self, searcher: Searcher, number: int, fresh: Incumbent | None = None) -> Incumbent:
        """A cycle from ``fresh``, or from the best selection, and kicks."""
        if fresh is None and self.best is not None:
            heat = HOT[number % len(HOT)] * self.unit
            found = searcher.cycle(self.best, heat, CYCLE_STEPS, CYCLE_MOVES, self.deadline)
        else:
            heat = FRESH_HOT * self.unit
            found = searcher.cycle(fresh or self._fresh(), heat, CYCLE_STEPS, CYCLE_MOVES, self.deadline, blocks=True)
        return self._kicked(searcher, found)

    def _kicked(self, searcher: Searcher, found: Incumbent) -> Incumbent:
        return searcher.kicks(found, KICKS, KICK_HOT * self.unit, self.deadline) if math.isfinite(found.energy) else found
