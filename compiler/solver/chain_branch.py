"""Best-first branch and bound over the dual of ``chain_dual``, for what prices alone cannot close.

At the best prices the bound is met by a mixture of selections, one with too much load, another with too little. A node's strategies are
split by how much priced load (stream seconds and bytes at their prices) they bring next to the selections of the mixture; in each half
the mixture has to look for other selections. Every split partitions the strategies, so the least bound of the open parts is a lower bound
of the whole, whatever is chosen to split.
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass, field

import numba
import numpy as np

from .chain_dual import Cut, Dual, Point
from .exact import Mip
from .model import Model
from .presolve import presolve

EXACT_ENTRIES = 12_000
"""Finite edge entries up to which a remainder goes to the exact solver."""


@dataclass(order=True, slots=True)
class Part:
    """A part of the search space and the state its dual ended with."""

    bound: float
    number: int
    forbidden: np.ndarray = field(compare=False)  # bool per strategy
    messages: np.ndarray = field(compare=False)
    best: Point = field(compare=False)
    cuts: list[Cut] = field(compare=False)
    mixture: list[tuple[float, Cut]] = field(compare=False)


class Search:
    """Parts by bound; ``bound`` holds for the whole model at any time, ``closed`` if it meets the best selection."""

    def __init__(self, dual: Dual, gap: float, seed: int) -> None:
        self.dual, self.gap, self.seed, self.count = dual, gap, seed, 0
        self.heap = [Part(dual.bound, 0, np.zeros(len(dual.own_cost), dtype=bool), dual.msg.copy(), dual.best, dual.cuts, dual.mixture)]
        self.bound = dual.bound
        self.stuck = math.inf  # the least bound of parts that cannot be split

    def run(self, most: int) -> None:
        """Split up to ``most`` parts; the dual is left as it was found."""
        root = self.heap[0]
        for _ in range(most):
            if not self.heap or self._closed() or time.perf_counter() > self.dual.deadline:
                break
            part = heapq.heappop(self.heap)
            split = choose(self.dual, part)
            if split is None:
                self.stuck = min(self.stuck, self._finish(part))
                continue
            for half in split:
                child = self._solve(part, part.forbidden | half)
                if child.bound < self._enough():
                    heapq.heappush(self.heap, child)
                else:
                    self.stuck = min(self.stuck, child.bound)
        self.bound = max(self.bound, self._least())
        self._enter(root, root.forbidden)
        self.dual.bound = root.bound

    def _least(self) -> float:
        return min(self.heap[0].bound if self.heap else math.inf, self.stuck, self.dual.upper)

    def _enough(self) -> float:
        """The bound at which a part is done with: within half the gap of the best selection, or above what any selection can cost."""
        upper = self.dual.upper
        return upper - 0.5 * self.gap * abs(upper) if upper < math.inf else self.dual.ceiling

    def _closed(self) -> bool:
        return self.dual.upper < math.inf and self.dual.upper - self._least() <= self.gap * abs(self.dual.upper)

    def _enter(self, part: Part, forbidden: np.ndarray) -> None:
        self.dual.restrict(forbidden)
        self.dual.msg[:] = part.messages
        self.dual.bound, self.dual.best = -math.inf, part.best

    def _finish(self, part: Part) -> float:
        """The bound of a part that cannot be split: exact if what could be better than the best selection is little."""
        dual = self.dual
        self._enter(part, part.forbidden)
        model = dual.forbid([part.best], dual.upper)
        model.cost[part.forbidden] = np.inf
        reduced = presolve(model)
        if reduced.infeasible or (reduced.model.slot_limit < 0).any():
            return math.inf
        if np.isfinite(reduced.model.edge_cost).sum() > EXACT_ENTRIES:
            return part.bound
        x, bound = solve_exactly(reduced.model, dual.deadline, 0.5 * self.gap, self.seed)
        if x is not None:
            dual.cut(reduced.undo(x))
        return max(part.bound, bound)

    def _solve(self, parent: Part, forbidden: np.ndarray) -> Part:
        dual = self.dual
        self.count += 1
        self._enter(parent, forbidden)
        first = dual.model.node_off[:-1]
        kept = [c for c in parent.cuts if not forbidden[first + c.x].any()]
        dual.ascend(0.5 * self.gap, 12, kept[-20:])
        bound = max(parent.bound, dual.bound)
        return Part(bound, self.count, forbidden, dual.msg.copy(), dual.best, dual.cuts, dual.mixture)


def choose(dual: Dual, part: Part) -> tuple[np.ndarray, np.ndarray] | None:
    """The two sets of strategies of one node to forbid in turn, or None where the mixture agrees everywhere."""
    if len(part.mixture) < 2:
        return None
    model = dual.model
    spread = np.zeros(model.num_nodes)
    loads = [strategy_loads(dual, part.best, cut.x) for _, cut in part.mixture]
    shares = np.array([w for w, _ in part.mixture])
    own = np.array([load[model.node_off[:-1] + cut.x] for load, (_, cut) in zip(loads, part.mixture, strict=True)])
    mean = shares @ own / shares.sum()
    spread = shares @ (own - mean) ** 2
    together = sum(s * load for s, load in zip(shares, loads, strict=True)) / shares.sum()
    for v in np.argsort(-spread, kind="stable")[:20]:
        a, b = model.node_off[v], model.node_off[v + 1]
        used = np.unique([cut.x[v] for _, cut in part.mixture])
        used = used[~part.forbidden[a + used]]  # the mixture may be older than the part
        values = np.sort(together[a + used])
        at = int(np.diff(values).argmax()) if len(values) > 1 else -1
        if at < 0 or values[at + 1] <= values[at]:
            continue
        high = together[a:b] > 0.5 * (values[at] + values[at + 1])
        halves = np.zeros((2, len(dual.own_cost)), dtype=bool)
        halves[0, a:b], halves[1, a:b] = high, ~high
        return halves[0], halves[1]
    return None


def strategy_loads(dual: Dual, point: Point, x: np.ndarray) -> np.ndarray:
    """Priced load that each strategy brings if all other nodes choose as ``x`` (edges counted at both ends)."""
    model = dual.model
    load = sum((p * u for p, u in zip(point.price, dual.usage, strict=False)), np.zeros(len(dual.own_cost)))
    for s in range(model.num_streams):
        weight = max(float(point.weight[s]), 1e-6)
        load = load + weight * model.node_stream[s]
        _add_edge_loads(weight, model.edge_stream[s], x, model.node_off, model.edge_u, model.edge_v, model.edge_off, load)
    return load


@numba.njit(cache=True, nogil=True)
def _add_edge_loads(weight, values, x, node_off, edge_u, edge_v, edge_off, out):  # type: ignore[no-untyped-def]
    """To ``out`` per strategy ``weight`` times ``values`` of the node's edges, the other ends as in ``x``."""
    for e in range(len(edge_u)):
        u, v, base = edge_u[e], edge_v[e], edge_off[e]
        width = node_off[v + 1] - node_off[v]
        for i in range(node_off[u + 1] - node_off[u]):
            out[node_off[u] + i] += weight * values[base + i * width + x[v]]
        for j in range(width):
            out[node_off[v] + j] += weight * values[base + x[u] * width + j]


def solve_exactly(model: Model, deadline: float, gap: float, seed: int, target: float = -math.inf) -> tuple[np.ndarray | None, float]:
    """A selection of a small model, the first that costs ``target`` or less, and its bound; none and infinity if it has no feasible one."""
    if model.num_nodes == 0:
        return np.zeros(0, dtype=np.int64), model.objective(np.zeros(0, dtype=np.int64))
    result = Mip(model).solve(deadline, gap, seed, target=target)
    return (None, math.inf) if result.infeasible else (result.selection, result.lower_bound)
