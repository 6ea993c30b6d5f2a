"""The phases of the local search on one model, with their parameters: from a dual state to a feasible selection, then cycles.

A searcher has its own random state and work space, so two of them run in two threads (the kernels release the interpreter lock).
Steps are counted, not timed, so a run is repeatable for a seed unless the deadline cuts it short.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from .blocks import anneal_blocks
from .forest import new_scratch
from .graph import Flows, Graph, Rows
from .kick import kick
from .search import anneal, refine, set_seed


@dataclass(slots=True)
class Incumbent:
    """A selection, its energy (the objective without the constant; inf: none feasible yet) and the prices it was found with."""

    x: np.ndarray
    energy: float
    price: np.ndarray


class Searcher:
    """``unit``: typical energy per node, the scale of noise."""

    def __init__(self, graph: Graph, rows: Rows, flows: Flows, seed: int, unit: float) -> None:
        self.graph, self.unit, self.rows = graph, unit, rows
        self.field = (graph, rows, flows, new_scratch(graph, seed))
        self.rng = np.random.default_rng(seed)

    def descend(self, start: Incumbent, moves: int, deadline: float) -> Incumbent:
        """Repair of memory and strict descent by small and large regions."""
        return self._refine(start, ((moves, 1, 10, 0.0, 0.0), (moves // 4, 1, 100, 0.0, 0.0)), deadline)

    def cycle(self, start: Incumbent, hot: float, steps: int, moves: int, deadline: float, *, blocks: bool = False) -> Incumbent:
        """Anneal from noise ``hot`` (energy units), the whole graph at once or by ``blocks``, then settle under the true limits."""
        set_seed(int(self.rng.integers(1 << 30)))
        x, price, best = start.x.copy(), start.price.copy(), start.x.copy()
        state = np.array([np.inf, np.inf, 0.0])
        done = 0
        while done < steps and time.perf_counter() < deadline:
            chunk = min(20, steps - done)
            if blocks:
                anneal_blocks(chunk, done, steps, hot, hot * 1e-2, x, price, best, state, *self.field)
            else:
                anneal(chunk, done, steps, hot, hot * 1e-2, 0.02, x, price, best, state, *self.field)
            done += chunk
        met = Incumbent(best.copy(), float(state[0]), price)
        warm = min(hot, self.unit) * 0.1
        stages = ((moves, 1, 20, warm, warm * 1e-2), (moves // 4, 1, 100, 0.0, 0.0), (moves // 4, 1, 10, 0.0, 0.0))
        found = self._refine(Incumbent(x, np.inf, price), stages, deadline)
        return found if found.energy <= met.energy else met

    def settle(self, start: Incumbent, hot: float, moves: int, largest: int, deadline: float) -> Incumbent:
        """Annealing by regions only, close to ``start``."""
        return self._refine(start, ((moves, 1, largest, hot, hot * 1e-2), (moves // 4, 1, largest, 0.0, 0.0)), deadline)

    def kicks(self, start: Incumbent, count: int, hot: float, deadline: float) -> Incumbent:
        """``count`` forced changes at costly nodes, each kept if it is better. ``start`` must be feasible."""
        set_seed(int(self.rng.integers(1 << 30)))
        x, state, done = start.x.copy(), np.array([start.energy]), 0
        while done < count and time.perf_counter() < deadline:
            chunk = min(50, count - done)
            kick(chunk, hot, x, start.price, state, *self.field)
            done += chunk
        return Incumbent(x, float(state[0]), start.price)

    def _refine(self, start: Incumbent, stages: tuple[tuple[int, int, int, float, float], ...], deadline: float) -> Incumbent:
        set_seed(int(self.rng.integers(1 << 30)))
        x, price, best = start.x.copy(), start.price.copy(), start.x.copy()
        binding = int((price > 1e-3 * price.max(initial=0.0)).sum())
        penalty = 3.0 * float(price.sum()) / max(binding, 1)
        if len(price) and penalty <= 0:
            penalty = self.unit / float(self.rows.scale.max())
        state = np.array([start.energy, np.inf, 0.0, penalty])
        for moves, smallest, largest, hot, cold in stages:
            done, rate = 0, 0.02 if hot > 0 else 0.0
            while done < moves and time.perf_counter() < deadline:
                chunk = min(4000, moves - done)
                refine(chunk, done, moves, smallest, largest, hot, cold, rate, x, price, best, state, *self.field)
                done += chunk
            if np.isfinite(state[0]):
                x = best.copy()
            state[3] = max(state[3], penalty)
        for _ in range(3):
            if np.isfinite(state[0]) or time.perf_counter() > deadline:
                break
            state[3] *= 4.0
            refine(4000, 0, 4000, 1, 20, 0.0, 0.0, 0.0, x, price, best, state, *self.field)
        return Incumbent(best, float(state[0]), price)
