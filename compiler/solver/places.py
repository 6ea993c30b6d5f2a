"""Problems with places: many small independent decisions under a few full memory slots and streams, solved to a proven gap.

Statement
    The problem of ``problem.py`` where most nodes say where one value or parameter lives and few edges are dense. Its linear relaxation
    (``places_bound``) is nearly integral: about as many nodes are split as there are full slots and busy streams. So
    1. relax: the bound of everything that follows, and what each strategy costs at least above it;
    2. neighbourhoods: fix all nodes as relaxed except the split ones and a growing number of nodes that have alternatives at (nearly) no
       cost, which is what fills slots and streams exactly; the integer program over them is small;
    3. proof: if the gap is not met, a better selection uses only strategies that cost no more above the bound than the distance between the
       best selection and the bound; the integer program over those raises the bound, too.
    If there is no selection, the same relaxation with one pool's limits made elastic says how many bytes the leanest one needs.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from ..problem import SelectionProblem
from .model import Model
from .places_bound import Relaxation, Relaxed, argmax_per_node
from .presolve import Reduced, presolve
from .reasons import FORBIDDEN_EVERYWHERE, slot_reason
from .start import Offer, Outcome, Start
from .substitute import drop_slots, without_slots

MOST_NODES, MOST_ENTRIES = 20_000, 1_000_000
"""Nodes and edge entries above which the simplex method takes too long."""

OPEN_NODES = (0, 50, 50, 150, 150, 400, 400, 1000)
"""Nodes opened besides the split ones, one integer program after the other."""

BRANCHES, PROOF_BRANCHES = 300, 1_000_000
SPLIT = 1e-7
REASON_S = 5.0
"""Seconds, beyond the time limit if need be, for the reason why there is no selection."""


class Places:
    """One solve. ``x`` is in terms of the problem, ``local`` of the reduced model."""

    def __init__(self, reduced: Reduced, deadline: float, gap: float, seed: int, offer: Offer, enough: float = 0.0) -> None:
        """enough: a gap at which no further integer program is begun."""
        self.deadline, self.gap, self.seed, self.enough = deadline, gap, seed, max(gap, enough)
        self.reduced, self.model, self.report = reduced, reduced.model, offer
        self.x: np.ndarray | None = None
        self.local = np.zeros(0, dtype=np.int64)
        self.objective, self.bound = math.inf, -math.inf
        self.infeasible = bool(self.reduced.infeasible) or bool((self.model.slot_limit < 0).any())

    def run(self) -> None:
        if self.infeasible:
            return
        if self.model.num_nodes == 0:
            self._offer(np.zeros(0, dtype=np.int64))
            self.bound = self.objective
            return
        relaxation = Relaxation(self.model)
        relaxation.add_initial_slots()
        root = relaxation.relax(self.deadline)
        if root is None:
            return
        self.infeasible, self.bound = root.infeasible, root.bound
        if self.infeasible:
            return
        self._round(root)
        self._neighbourhoods(root)
        self._prove(root)

    def done(self) -> bool:
        met = self.objective - self.bound <= self.enough * abs(self.objective) if self.objective < math.inf else False
        return met or time.perf_counter() > self.deadline

    def _offer(self, x: np.ndarray) -> None:
        """Keep a selection of the reduced model if it is allowed and better."""
        objective = self.model.objective(x)
        if objective < self.objective and (self.model.loads(x) <= self.model.slot_limit).all():
            self.objective, self.x, self.local = objective, self.reduced.undo(x.copy()), x
            self.report(objective, self.bound)

    def _round(self, root: Relaxed) -> None:
        self._offer(argmax_per_node(self.model, root.x))

    def _neighbourhoods(self, root: Relaxed) -> None:
        m, rng = self.model, np.random.default_rng(self.seed)
        owner = np.repeat(np.arange(m.num_nodes), m.sizes())
        delta = max(self.gap, 1e-6) * abs(root.bound)
        split = np.maximum.reduceat(root.x, m.node_off[:-1]) < 1.0 - SPLIT
        second = _second_least(root.reduced, m)
        tried = np.zeros(len(m.cost), dtype=bool)
        for num_open in OPEN_NODES:
            if self.done():
                return
            opened = split.copy()
            order = np.lexsort((rng.permutation(m.num_nodes), np.floor(10.0 * second / max(delta, 1e-300))))
            opened[order[second[order] <= delta][:num_open]] = True
            keep = (root.x > SPLIT) | (opened[owner] & (root.reduced <= delta))
            if self.x is not None:
                keep[m.node_off[:-1] + self.local] = True
            if (keep & ~tried).any():
                tried = keep
                self._restricted(keep, BRANCHES)

    def _restricted(self, keep: np.ndarray, branches: int) -> float:
        """Offer the best selection with strategies of ``keep`` only; a bound on all of those."""
        part = presolve(drop_slots(replace(self.model, cost=np.where(keep, self.model.cost, np.inf))))
        if part.infeasible or (part.model.slot_limit < 0).any():
            return math.inf
        if part.model.num_nodes == 0:
            x = np.zeros(0, dtype=np.int64)
            self._offer(part.undo(x))
            return part.model.objective(x)
        relaxation = Relaxation(part.model)
        relaxation.add_initial_slots()
        relaxed = relaxation.relax(self.deadline)
        if relaxed is None:
            return -math.inf
        if relaxed.infeasible or relaxed.bound >= self.objective:
            return relaxed.bound
        found = relaxation.integral(self.deadline, 0.5 * self.gap, self.seed, branches)
        if found.x is not None:
            self._offer(part.undo(found.x))
        return max(relaxed.bound, found.bound)

    def _prove(self, root: Relaxed) -> None:
        if self.done():
            return
        reach = self.objective - root.bound
        bound = self._restricted(root.reduced <= reach, PROOF_BRANCHES)
        self.infeasible = self.x is None and bound == math.inf
        self.bound = max(self.bound, min(bound, self.objective))


def _second_least(reduced: np.ndarray, model: Model) -> np.ndarray:
    """float64[N]: what a node's second best strategy costs; infinite where there is none."""
    rest = reduced.copy()
    rest[model.node_off[:-1] + argmax_per_node(model, -np.where(np.isfinite(reduced), reduced, 1e300))] = np.inf
    return np.minimum.reduceat(rest, model.node_off[:-1])


def solve_places(start: Start, deadline: float, gap: float, seed: int, offer: Offer, enough: float = 0.0) -> Outcome:
    """A selection with its bound; neither where none is found by ``deadline``. enough: see `Places`."""
    run = Places(start.reduced, deadline, gap, seed, offer, enough)
    run.run()
    reason = why_infeasible(start.problem, start.model, time.perf_counter() + REASON_S, seed) if run.infeasible else ""
    return Outcome(run.x, run.bound, run.infeasible, reason)


def fits(model: Model) -> bool:
    """Whether a reduced model is of this kind: copies in both directions, or to more than one place, take a stream each."""
    return model.num_streams > 1 and model.num_nodes <= MOST_NODES and len(model.edge_cost) <= MOST_ENTRIES


def why_infeasible(problem: SelectionProblem, model: Model, deadline: float, seed: int) -> str:
    """The pool that is too small while the others keep their limits, with the bytes the leanest selection needs; or what else is known."""
    part = presolve(without_slots(model))
    if model.num_slots == 0 or part.infeasible:
        return FORBIDDEN_EVERYWHERE
    small = drop_slots(model)
    for pool in dict.fromkeys(small.slot_pool.tolist()):
        needs, slot = _least_bytes(small, pool, deadline, seed)
        if problem.limits[pool] < needs < math.inf:
            return slot_reason(problem, small, slot, math.floor(needs))
    return f"{FORBIDDEN_EVERYWHERE} and fits memory at every time; no pool alone is too small"


def _least_bytes(model: Model, pool: int, deadline: float, seed: int) -> tuple[float, int]:
    """Bytes that ``pool`` needs at least while the other pools keep their limits (0: not known), and the slot that shows it."""
    relaxation = Relaxation(model, elastic=pool)
    relaxation.add_initial_slots()
    relaxed = relaxation.relax(deadline)
    if relaxed is None or relaxed.infeasible:
        return 0.0, 0
    limit = float(model.slot_limit[model.slot_pool == pool].max())
    priced = {k: price for k, price in relaxed.slot_price.items() if model.slot_pool[k] == pool}
    slot = min(priced, key=lambda k: (priced[k], k), default=int(np.flatnonzero(model.slot_pool == pool)[0]))
    excess = relaxed.bound
    if excess <= 0:
        excess = max(excess, relaxation.integral(deadline, 1e-6, seed, BRANCHES).bound)
    return limit + excess * relaxation.stretch(), slot
