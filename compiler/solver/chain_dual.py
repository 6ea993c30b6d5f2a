"""Prices on memory slots and weights on streams, raised to the best lower bound by cutting planes over message passing.

Dual function
    ``phi(p, w) = min_x [cost(x) + w . stream(x) + sum_k p_k (load_k(x) - limit_k)]`` over selections without forbidden entries, for slot
    prices ``p >= 0`` and stream weights ``w >= 0`` with ``sum w <= 1``. For a feasible ``x`` the memory terms are not positive and
    ``w . stream(x) <= max(0, max_s stream_s(x))``, so ``phi`` is a lower bound of the problem at every ``(p, w)``; message passing
    bounds ``phi`` from below by any messages whatever, so its value is a lower bound too.
Cutting planes
    Every selection ``x`` bounds ``phi`` from above by a linear function of ``(p, w)``. The master program maximises the least of them
    within a box that grows while it pays; the next trial point lies between its optimum and the best point so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from ortools.linear_solver import pywraplp

from .fold import Fold, collapse, expand, fold
from .forest import clear_forest, grow_forest, new_scratch, solve_forest
from .graph import Graph, build_graph
from .marginals import needless
from .model import Model
from .trws import backward, forward, new_messages

SAFETY = 1e-12
"""Rounding error of a sum of costs, relative to the sum of their magnitudes; taken off every bound."""

STEP = 0.3
SETTLED = 0.5
"""The dual counts as settled when it can rise by no more than this part of the distance to the best selection."""

GRAIN = 0.3
"""Part of what is still open that a few rounds of messages should gain."""

FOLDED_ROUNDS, FOLDED_GRAIN = 60, 0.03
"""The same of a folded model, whose rounds cost a tenth."""

POLISH_IDLE = 2
"""Moves in a row, each without a gain of this part of what is open, after which a selection counts as settled."""
POLISH_GAIN = 1e-3

FIRST_BOX = 0.02

Offer = Callable[[np.ndarray, float], None]
"""Receives a selection that fits memory and its objective."""


@dataclass(slots=True)
class Point:
    """Prices per limit (cost units) of the slots in use, and weights of the streams."""

    price: np.ndarray
    weight: np.ndarray


@dataclass(slots=True)
class Cut:
    """A selection as a linear function of prices and weights."""

    x: np.ndarray
    cost: float
    stream: np.ndarray  # float64[S]
    over: np.ndarray  # float64[K]: (load - limit) / unit


class Master:
    """``max t`` with ``t <= cost + w . stream + p . over`` for every cut, ``0 <= p <= box * unit``, ``0 <= w <= box``, ``sum w <= 1``."""

    def __init__(self, num_streams: int, unit: float) -> None:
        self.solver = pywraplp.Solver.CreateSolver("GLOP")
        self.free = pywraplp.Solver.infinity()
        self.unit, self.box = unit, FIRST_BOX
        self.top = self.solver.NumVar(-self.free, self.free, "")
        self.solver.Maximize(self.top)
        self.weight = [self.solver.NumVar(0.0, min(1.0, self.box), "") for _ in range(num_streams)]
        together = self.solver.RowConstraint(-self.free, 1.0, "")
        for w in self.weight:
            together.SetCoefficient(w, 1.0)
        self.slots: list[int] = []
        self.price: list[pywraplp.Variable] = []
        self.rows: list[pywraplp.Constraint] = []
        self.cuts: list[Cut] = []

    def add_slot(self, k: int) -> None:
        price = self.solver.NumVar(0.0, self.box * self.unit, "")
        for row, cut in zip(self.rows, self.cuts, strict=True):
            row.SetCoefficient(price, -float(cut.over[k]))
        self.slots.append(k)
        self.price.append(price)

    def add_cut(self, cut: Cut) -> None:
        row = self.solver.RowConstraint(-self.free, cut.cost, "")
        row.SetCoefficient(self.top, 1.0)
        for w, seconds in zip(self.weight, cut.stream, strict=True):
            row.SetCoefficient(w, -float(seconds))
        for price, k in zip(self.price, self.slots, strict=True):
            row.SetCoefficient(price, -float(cut.over[k]))
        self.rows.append(row)
        self.cuts.append(cut)

    def widen(self, box: float) -> None:
        self.box = box
        for w in self.weight:
            w.SetUb(min(1.0, box))
        for price in self.price:
            price.SetUb(box * self.unit)

    def solve(self) -> tuple[float, Point, np.ndarray] | None:
        """Best model value, where, and the weights of the cuts there (they add up to one)."""
        if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
            return None
        price = np.array([v.solution_value() for v in self.price])
        weight = np.array([v.solution_value() for v in self.weight])
        mixture = np.array([row.dual_value() for row in self.rows])
        return self.top.solution_value(), Point(np.maximum(price, 0.0), np.clip(weight, 0.0, 1.0)), mixture

    def at_box(self, point: Point) -> bool:
        edge = 0.999 * self.box
        tight = self.box < 1.0 and bool((point.weight >= edge).any())
        return tight or bool((point.price >= edge * self.unit).any())


class Dual:
    """The dual of one model: messages kept from trial to trial, the best point and its bound. folded: pass messages over the folded model
    (see ``fold``) as long as it is not told to `unfold`; selections met are then such in which equal nodes choose alike."""

    def __init__(self, model: Model, offer: Offer, deadline: float, seed: int, *, folded: bool = False) -> None:
        self.model, self.offer, self.deadline, self.seed = model, offer, deadline, seed
        self.usage: list[np.ndarray] = []
        self.slots: list[int] = []
        self._whole_graph: Graph | None = None
        self._take_graph(fold(model) if folded else None)
        self.random = np.random.default_rng(seed)
        self.unit = np.ones(model.num_slots)
        for pool in np.unique(model.slot_pool):
            here = model.slot_pool == pool
            self.unit[here] = max(float(model.slot_limit[here].max()), 1.0)
        self.cuts: list[Cut] = []
        self.mixture: list[tuple[float, Cut]] = []
        self.bound, self.upper = -math.inf, math.inf
        self.chosen: np.ndarray | None = None  # the selection that costs ``upper``, where this dual has met it
        self.rounds = 0
        self.best = Point(np.zeros(0), np.zeros(model.num_streams))
        self.ceiling = _ceiling(model)

    def _take_graph(self, folded: Fold | None) -> None:
        """Pass messages over the folded model, or the whole one."""
        self.folded = folded
        self.part = self.model if folded is None else folded.small
        self.graph = self._whole() if folded is None else build_graph(self.part)
        self.base = self.graph.matrix.copy()
        self.streams = [_stream_matrix(self.part, s) for s in range(self.part.num_streams)]
        self.own_cost = self.graph.cost.copy()
        self.msg_off, self.msg = new_messages(self.graph)
        self.scratch = new_scratch(self.graph, self.seed)

    def _whole(self) -> Graph:
        """The whole model's graph, made once."""
        if self._whole_graph is None:
            self._whole_graph = build_graph(self.model)
        return self._whole_graph

    def unfold(self) -> None:
        """Go on with the whole model, from the same messages."""
        if self.folded is not None:
            before, graph, off, msg = self.folded, self.graph, self.msg_off, self.msg
            self._take_graph(None)
            self.msg[:] = expand(before, graph, off, msg, self.graph, self.msg_off)
            self.usage = [slot_usage(self.model, k) / self.unit[k] for k in self.slots]

    def _fold_finer(self, before: Fold) -> None:
        """Fold again, so that equal nodes agree in the slots in use."""
        small, off, msg = self.graph, self.msg_off, self.msg
        usages = [slot_usage(self.model, k) / self.unit[k] for k in self.slots]
        finer = fold(self.model, usages)
        whole = self._whole()
        whole_off, _ = new_messages(whole)
        msg = expand(before, small, off, msg, whole, whole_off)
        self._take_graph(finer)
        self.msg[:] = msg if finer is None else collapse(finer, self.graph, self.msg_off, whole, whole_off, msg)
        self.usage = usages if finer is None else [finer.sums(u) for u in usages]

    def restrict(self, forbidden: np.ndarray) -> None:
        """Search only among the strategies not ``forbidden`` (bool per strategy)."""
        assert self.folded is None, "parts are made of the whole model"
        self.graph.cost[:] = np.where(forbidden, self.graph.big, self.own_cost)

    def add_slot(self, k: int) -> None:
        """Give slot ``k`` a price of its own, zero so far."""
        self.slots.append(k)
        usage = slot_usage(self.model, k) / self.unit[k]
        if self.folded is not None and not self.folded.is_even(usage):
            self._fold_finer(self.folded)
        else:
            self.usage.append(usage if self.folded is None else self.folded.sums(usage))

    def price(self, point: Point) -> tuple[np.ndarray, float]:
        """Node costs and constant under ``point``; sets the edge matrices."""
        m = self.model
        np.copyto(self.graph.matrix, self.base)
        unary, constant = self.graph.cost.copy(), m.constant
        for w, matrix, node, fixed in zip(point.weight, self.streams, self.part.node_stream, m.stream_constant, strict=True):
            if w > 0:
                np.add(self.graph.matrix, w * matrix, out=self.graph.matrix)
                unary += w * node
                constant += w * fixed
        for p, usage, k in zip(point.price, self.usage, self.slots, strict=False):
            if p > 0:
                unary += p * usage
                constant -= p * m.slot_limit[k] / self.unit[k]
        return unary, float(constant)

    def cut(self, x: np.ndarray) -> Cut:
        """The cut of ``x``, a selection of the model that messages are passed over; offers it if it fits."""
        m = self.model
        if self.folded is not None:
            x = x[self.folded.colour]
        over = m.loads(x) - m.slot_limit
        stream = m.streams(x)
        entries = np.concatenate([m.cost[m.node_off[:-1] + x], m.edge_cost[m.edge_entries(x)]])
        cost = float(m.constant + np.minimum(entries, self.graph.big).sum())
        objective = cost + max(0.0, float(stream.max(initial=0.0))) if np.isfinite(entries).all() else math.inf
        if objective < self.upper and not (over > 0).any():
            self.upper, self.chosen = objective, x.copy()
            self.offer(x, objective)
        return Cut(x.copy(), cost, stream, over / self.unit)

    def trial(self, point: Point, rounds: int, tolerance: float, grain: float) -> Cut:
        """Raise the bound at ``point`` until rounds gain less than ``grain``; returns the cut of the best selection met there."""
        unary, constant = self.price(point)
        x = np.zeros(self.part.num_nodes, dtype=np.int64)
        value, best, last, reached = math.inf, None, -math.inf, -math.inf
        for i in range(rounds):
            forward(unary, self.msg_off, self.msg, self.graph, x)
            self.rounds += 1
            cut = self.cut(x)
            here = self.value(point, cut)
            if best is None or here < value:
                value, best = here, cut
            reached = max(reached, self._safe(backward(unary, self.msg_off, self.msg, self.graph) + constant, point))
            if reached > self.bound:
                self.bound, self.best = reached, point
            if value - reached <= 1e-9 * abs(reached) or self.upper - reached <= tolerance or time.perf_counter() > self.deadline:
                break
            if i % 3 == 2:
                if reached - last <= 0.2 * grain:
                    break
                last = reached
        assert best is not None, "at least one round"
        return self._polish(point, unary, best, max(tolerance, 1e-9 * abs(reached)) + reached)

    def _polish(self, point: Point, unary: np.ndarray, cut: Cut, target: float) -> Cut:
        """Exact moves on random forests at fixed prices; every selection on the way is offered."""
        x, value, idle = self._members(cut.x), self.value(point, cut), 0
        self.scratch.unary[:] = unary
        while value > target and idle < POLISH_IDLE:
            count = grow_forest(self.random.permutation(len(x)), len(x), self.graph, self.scratch)
            solve_forest(count, x, 0.0, self.graph, self.scratch)
            clear_forest(count, self.scratch)
            new = self.cut(x)
            here = self.value(point, new)
            idle = idle + 1 if here >= value - POLISH_GAIN * (value - target) else 0
            if here < value:
                cut, value = new, here
        return cut

    def _members(self, x: np.ndarray) -> np.ndarray:
        """The selection of the model that messages are passed over, of one in which equal nodes choose alike."""
        if self.folded is None:
            return x.copy()
        out = np.zeros(self.part.num_nodes, dtype=np.int64)
        out[self.folded.colour] = x
        return out

    def value(self, point: Point, cut: Cut) -> float:
        """The priced cost of a cut's selection at ``point``."""
        return cut.cost + float(point.weight @ cut.stream) + self._priced(point, cut)

    def _priced(self, point: Point, cut: Cut) -> float:
        return sum(float(p * cut.over[k]) for p, k in zip(point.price, self.slots, strict=False))

    def _safe(self, bound: float, point: Point) -> float:
        return bound - SAFETY * (abs(bound) + float(point.price.sum()) + abs(self.model.constant))

    def ascend(self, gap: float, trials: int, cuts: Sequence[Cut] = ()) -> bool:
        """Raise the bound until it meets the best selection (relative ``gap``), nothing is gained, or ``trials``."""
        fine = 0.1 * gap * self._scale()
        room = self.upper - self.bound
        cut = self.trial(self.best, 150, fine, max(fine, GRAIN * room) if math.isfinite(room) else fine)
        master = self._master(cut, cuts)
        self.cuts, self.mixture = master.cuts, [(1.0, cut)]
        mixed, history = cut.over, [self.upper]
        for _ in range(trials):
            if self._met(gap) or self.bound > self.ceiling or time.perf_counter() > self.deadline:
                return True
            for over in (master.cuts[-1].over, mixed):
                self._take_slot(master, over)
            answer = master.solve()
            if answer is None:
                return False
            top, goal, weights = answer
            self.mixture = [(float(w), c) for w, c in zip(weights, master.cuts, strict=True) if w > 1e-6]
            grow = master.at_box(goal)
            if not grow and top - self.bound <= 0.1 * gap * abs(top):
                break
            mixed = sum((w * c.over for w, c in zip(weights, master.cuts, strict=True) if w > 1e-9), np.zeros(self.model.num_slots))
            before = self.bound
            fine = 0.1 * gap * self._scale()
            rounds, grain = (12, GRAIN) if self.folded is None else (FOLDED_ROUNDS, FOLDED_GRAIN)
            cut = self.trial(_between(self.best, goal, STEP), rounds, fine, max(fine, grain * (top - self.bound)))
            master.add_cut(cut)
            if grow and (self.bound > before or self.upper == math.inf):
                master.widen(4.0 * master.box)
            history.append(self.upper)
            settled = top - self.bound <= SETTLED * (self.upper - top) and len(history) > 6 and history[-6] == self.upper
            if settled and self.upper < math.inf:
                break
        return self._met(gap)

    def _master(self, first: Cut, cuts: Sequence[Cut]) -> Master:
        """The master program with what is known: ``first``, ``cuts`` of earlier trials, the slots in use."""
        master = Master(self.model.num_streams, max(abs(first.cost), 1e-300))
        for k in self.slots:
            master.add_slot(k)
        for cut in (first, *cuts):
            master.add_cut(cut)
        top = max([0.0, *self.best.weight.tolist(), *(self.best.price / master.unit).tolist()])
        master.widen(max(FIRST_BOX, 4.0 * top))
        return master

    def _scale(self) -> float:
        return abs(self.upper) if self.upper < math.inf else abs(self.bound) if self.bound > -math.inf else 0.0

    def _met(self, gap: float) -> bool:
        return self.upper - self.bound <= gap * abs(self.upper) if self.upper < math.inf else False

    def _take_slot(self, master: Master, over: np.ndarray) -> None:
        if len(over) == 0:
            return
        k = int(over.argmax())
        if over[k] > 1e-7 and k not in self.slots:
            self.add_slot(k)
            master.add_slot(k)

    def forbid(self, points: list[Point], upper: float) -> Model:
        """The model without the strategies and pairs that no selection below ``upper`` uses."""
        assert self.folded is None, "what is forbidden is forbidden for one node"
        nodes, pairs = np.zeros(len(self.model.cost), dtype=bool), np.zeros(len(self.base), dtype=bool)
        room = upper + 1e-9 * abs(upper)
        for point in points:
            unary, constant = self._settle(point, 8)
            bound = self._safe(backward(unary, self.msg_off, self.msg, self.graph) + constant, point)
            needless(room - bound, unary, self.msg_off, self.msg, self.graph, nodes, pairs)
        m = self.model
        result = replace(m, cost=np.where(nodes, np.inf, m.cost), edge_cost=m.edge_cost.copy())
        halves = np.flatnonzero(self.graph.neighbor > np.repeat(np.arange(m.num_nodes), np.diff(self.graph.half_off)))
        for e, h in zip(np.argsort(m.edge_u, kind="stable"), halves, strict=True):
            a, b = m.edge_off[e], m.edge_off[e + 1]
            result.edge_cost[a:b][pairs[self.graph.at[h] : self.graph.at[h] + b - a]] = np.inf
        return result

    def _settle(self, point: Point, rounds: int) -> tuple[np.ndarray, float]:
        """Messages for ``point``; returns its node costs and constant."""
        unary, constant = self.price(point)
        x = np.zeros(self.model.num_nodes, dtype=np.int64)
        for _ in range(rounds):
            forward(unary, self.msg_off, self.msg, self.graph, x)
            backward(unary, self.msg_off, self.msg, self.graph)
        return unary, constant


def slot_usage(model: Model, k: int) -> np.ndarray:
    """Bytes that every strategy brings to slot ``k``."""
    usage = np.zeros(len(model.cost))
    for r in np.flatnonzero((model.row_start <= k) & (model.row_end > k)):
        at = model.node_off[model.row_node[r]]
        usage[at : at + model.row_off[r + 1] - model.row_off[r]] += model.row_bytes[model.row_off[r] : model.row_off[r + 1]]
    return usage


def _ceiling(model: Model) -> float:
    """No selection costs more."""
    total = model.constant
    for cost, off in ((model.cost, model.node_off), (model.edge_cost, model.edge_off)):
        finite = np.where(np.isfinite(cost), cost, -np.inf)
        total += float(np.maximum.reduceat(finite, off[:-1]).sum()) if len(off) > 1 else 0.0
    seconds = model.stream_constant.copy()
    for s in range(model.num_streams):
        for values, off in ((model.node_stream[s], model.node_off), (model.edge_stream[s], model.edge_off)):
            seconds[s] += float(np.maximum.reduceat(values, off[:-1]).sum()) if len(off) > 1 else 0.0
    total += max(0.0, float(seconds.max(initial=0.0)))
    return total + 1e-6 * abs(total) + 1e-6


def _stream_matrix(model: Model, s: int) -> np.ndarray:
    return build_graph(replace(model, cost=np.zeros_like(model.cost), edge_cost=model.edge_stream[s])).matrix


def _between(a: Point, b: Point, step: float) -> Point:
    start = np.concatenate([a.price, np.zeros(len(b.price) - len(a.price))])
    return Point(start + step * (b.price - start), a.weight + step * (b.weight - a.weight))
