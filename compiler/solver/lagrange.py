"""Lower bounds: prices on memory slots and weights on streams around message passing.

For prices ``p >= 0`` per slot and weights ``w >= 0`` with ``sum w <= 1`` per stream,
``min_x [cost(x) + w . streams(x) + sum_k p_k (load_k(x) - limit_k)]`` is a lower bound of the problem, and TRW-S bounds that minimum from
below. Prices follow the loads by multiplicative weights with a step that halves every ``HALF_LIFE`` rounds. The loads are those of a
fractional selection: each node takes its strategies in proportion to ``exp(-excess / temperature)``, the excess of their beliefs. Near the
optimum many strategies tie and the relaxed selection mixes them; loads of a rounded one would jump from side to side and say little.

Fixing: when TRW-S visits a node after a backward pass, its total belief ``D`` is the sum of the min-marginals of all chains through the
node, so every selection with strategy ``i`` costs at least ``bound + D[i] - min D``. Strategies for which that is above the best
known objective are not needed.
"""

from __future__ import annotations

import time

import numba
import numpy as np

from .graph import build_graph, build_rows
from .memory import add_prices, prefix
from .model import Model
from .search import PRICE_FLOOR
from .trws import backward, beliefs, forward, new_messages

HALF_LIFE = 150.0
FIRST_RATE, LAST_RATE = 3.0, 0.02
SMOOTHING = 0.5
FIRST_TEMPERATURE, LAST_TEMPERATURE = 1e-2, 5e-4
"""Of the shares of strategies, in units of energy per node; it halves with the step."""


class Dual:
    """The state of the dual ascent of one model at fixed stream weights; ``run`` continues it."""

    def __init__(self, model: Model, stream_weight: np.ndarray | None = None, warm: Dual | None = None) -> None:
        """``warm``: another dual of the same model, whose messages to start from."""
        self.model = model
        self.weight = np.zeros(model.num_streams) if stream_weight is None else stream_weight
        self.graph = build_graph(model, self.weight)
        self.rows = build_rows(model)
        self.offset = model.constant + float(self.weight @ model.stream_constant)
        self.msg_off, self.msg = new_messages(self.graph)
        if warm is not None:
            self.msg = warm.msg.copy()
        self.unary = self.graph.cost.copy()
        self.x = np.zeros(model.num_nodes, dtype=np.int64)
        self.price = np.zeros(model.num_slots)
        self.best_price = np.zeros(model.num_slots)
        self.trend = np.zeros(model.num_slots)
        self.iterations = 0
        self.bound = -np.inf
        self.unit = 0.0  # energy per node, set with the first prices

    def run_unpriced(self, iterations: int, deadline: float) -> None:
        """Message passing without prices."""
        for _ in range(iterations):
            forward(self.graph.cost, self.msg_off, self.msg, self.graph, self.x)
            self._record(backward(self.graph.cost, self.msg_off, self.msg, self.graph))
            if time.perf_counter() > deadline:
                break

    def start_prices(self, magnitude: float) -> None:
        """All slots at the same price, such that full slots cost about ``magnitude`` (the energy of a selection) together."""
        self.unit = magnitude / max(self.model.num_nodes, 1)
        self.price = np.full(self.model.num_slots, magnitude / max(self.model.num_slots, 1)) / self.rows.scale
        if not self.best_price.any():
            self.best_price = self.price.copy()

    def run(self, iterations: int, deadline: float) -> None:
        """Continue the ascent, a few rounds at a time until ``deadline`` (``time.perf_counter`` seconds)."""
        while iterations > 0 and time.perf_counter() < deadline:
            chunk = min(iterations, 10)
            found = np.array([self.bound - self.offset])
            _ascend(
                chunk, self.iterations, self.unit, self.price, self.best_price, self.trend, found,
                self.msg_off, self.msg, self.unary, self.graph, self.rows,
            )  # fmt: skip
            self.iterations += chunk
            iterations -= chunk
            self._record(float(found[0]))
        forward(self.unary, self.msg_off, self.msg, self.graph, self.x)

    def needless(self, upper: float) -> np.ndarray:
        """bool per strategy: every selection with it costs more than ``upper`` (an objective of the model)."""
        cum = np.zeros(self.model.num_slots + 1)
        prefix(self.best_price, cum)
        _price_all(cum, self.graph, self.rows, self.unary)
        above, excess = np.full(len(self.unary), -np.inf), np.empty(len(self.unary))
        for _ in range(3):
            bound = backward(self.unary, self.msg_off, self.msg, self.graph) - float(self.best_price @ self.rows.limit)
            self._record(bound)
            beliefs(self.unary, self.msg_off, self.msg, self.graph, excess)
            above = np.maximum(above, bound + self.offset + excess)
        return above > upper + 1e-9 * abs(upper)

    def _record(self, bound: float) -> None:
        """Keep the best bound, less the rounding error of the sums."""
        self.bound = max(self.bound, bound + self.offset)


@numba.njit(cache=True, nogil=True)
def _price_all(cum, g, rows, unary):  # type: ignore[no-untyped-def]
    for v in range(len(g.node_off) - 1):
        add_prices(v, cum, 1.0, g, rows, unary)


@numba.njit(cache=True, nogil=True)
def soft_loads(excess, temperature, g, rows, load):  # type: ignore[no-untyped-def]
    """Bytes per slot if each node takes its strategies in proportion to ``exp(-excess / temperature)``."""
    num = len(load)
    load[:] = 0.0
    for v in range(len(g.node_off) - 1):
        lo, hi, total = g.node_off[v], g.node_off[v + 1], 0.0
        for i in range(lo, hi):
            cold = excess[i] / temperature
            excess[i] = np.exp(-cold) if cold < 30.0 else 0.0
            total += excess[i]
        for q in range(rows.node_off[v], rows.node_off[v + 1]):
            r, size = rows.of_node[q], 0.0
            for i in range(hi - lo):
                size += excess[lo + i] * rows.bytes[rows.off[r] + i]
            load[rows.start[r]] += size / total
            if rows.end[r] < num:
                load[rows.end[r]] -= size / total
    for k in range(1, num):
        load[k] += load[k - 1]


@numba.njit(cache=True, nogil=True)
def _ascend(steps, done, unit, price, best_price, trend, found, off, msg, unary, g, rows):  # type: ignore[no-untyped-def]
    slots = len(price)
    load, cum, excess = np.empty(slots), np.empty(slots + 1), np.empty(len(unary))
    for k in range(done, done + steps):
        rate = max(FIRST_RATE * 0.5 ** (k / HALF_LIFE), LAST_RATE)
        temperature = unit * max(FIRST_TEMPERATURE * 0.5 ** (k / HALF_LIFE), LAST_TEMPERATURE)
        prefix(price, cum)
        _price_all(cum, g, rows, unary)
        beliefs(unary, off, msg, g, excess)
        bound = backward(unary, off, msg, g)
        total = 0.0
        for i in range(slots):
            bound -= price[i] * rows.limit[i]
            total += price[i]
        if bound > found[0]:
            found[0] = bound
            best_price[:] = price
        if slots > 0:
            soft_loads(excess, max(temperature, 1e-300), g, rows, load)
        floor = PRICE_FLOOR * total / max(slots, 1)
        for i in range(slots):
            gradient = min(max((load[i] - rows.limit[i]) / rows.scale[i], -1.0), 1.0)
            trend[i] = SMOOTHING * trend[i] + (1.0 - SMOOTHING) * gradient
            price[i] = max(price[i] * np.exp(rate * trend[i]), floor)
