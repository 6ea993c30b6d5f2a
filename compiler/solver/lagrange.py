"""Lower bounds: prices on memory slots and weights on streams around message passing.

For prices ``p >= 0`` per slot and weights ``w >= 0`` with ``sum w <= 1`` per stream,
``min_x [cost(x) + w . streams(x) + sum_k p_k (load_k(x) - limit_k)]`` is a lower bound of the problem, and TRW-S bounds that minimum from
below. Prices follow the load of the rounded selection by multiplicative weights with a step that halves every ``HALF_LIFE`` rounds.

Fixing: when TRW-S visits a node after a backward pass, its total belief ``D`` is the sum of the min-marginals of all chains through the
node, so every selection with strategy ``i`` costs at least ``bound + D[i] - min D``. Strategies for which that is above the best
known objective are not needed.
"""

from __future__ import annotations

import time

import numba
import numpy as np

from .graph import build_graph, build_rows
from .memory import add_prices, fill_loads, prefix
from .model import Model
from .search import PRICE_FLOOR
from .trws import backward, forward, new_messages, node_beliefs

HALF_LIFE = 150.0
FIRST_RATE = 0.5
LAST_RATE = 0.003
SMOOTHING = 0.9


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

    def run_unpriced(self, iterations: int, deadline: float) -> None:
        """Message passing without prices."""
        for _ in range(iterations):
            forward(self.graph.cost, self.msg_off, self.msg, self.graph, self.x)
            self._record(backward(self.graph.cost, self.msg_off, self.msg, self.graph))
            if time.perf_counter() > deadline:
                break

    def start_prices(self, magnitude: float) -> None:
        """All slots at the same price, such that full slots cost about ``magnitude`` together."""
        self.price = np.full(self.model.num_slots, magnitude / max(self.model.num_slots, 1)) / self.rows.scale
        if not self.best_price.any():
            self.best_price = self.price.copy()

    def run(self, iterations: int, deadline: float) -> None:
        """Continue the ascent, a few rounds at a time until ``deadline`` (``time.perf_counter`` seconds)."""
        while iterations > 0 and time.perf_counter() < deadline:
            chunk = min(iterations, 10)
            found = np.array([self.bound - self.offset])
            _ascend(
                chunk, self.iterations, self.x, self.price, self.best_price, self.trend, found,
                self.msg_off, self.msg, self.unary, self.graph, self.rows,
            )  # fmt: skip
            self.iterations += chunk
            iterations -= chunk
            self._record(float(found[0]))

    def needless(self, upper: float) -> np.ndarray:
        """bool per strategy: every selection with it costs more than ``upper`` (an objective of the model)."""
        cum = np.zeros(self.model.num_slots + 1)
        prefix(self.best_price, cum)
        _price_all(cum, self.graph, self.rows, self.unary)
        above = np.full(len(self.unary), -np.inf)
        for _ in range(3):
            bound = backward(self.unary, self.msg_off, self.msg, self.graph) - float(self.best_price @ self.rows.limit)
            self._record(bound)
            excess = node_beliefs(self.unary, self.msg_off, self.msg, self.graph, self.x)
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
def _ascend(steps, done, x, price, best_price, trend, found, off, msg, unary, g, rows):  # type: ignore[no-untyped-def]
    slots = len(price)
    load, cum = np.empty(slots), np.empty(slots + 1)
    for k in range(done, done + steps):
        rate = max(FIRST_RATE * 0.5 ** (k / HALF_LIFE), LAST_RATE)
        prefix(price, cum)
        _price_all(cum, g, rows, unary)
        forward(unary, off, msg, g, x)
        bound = backward(unary, off, msg, g)
        total = 0.0
        for i in range(slots):
            bound -= price[i] * rows.limit[i]
            total += price[i]
        if bound > found[0]:
            found[0] = bound
            best_price[:] = price
        fill_loads(x, rows, load)
        floor = PRICE_FLOOR * total / max(slots, 1)
        for i in range(slots):
            gradient = min(max((load[i] - rows.limit[i]) / rows.scale[i], -1.0), 1.0)
            trend[i] = SMOOTHING * trend[i] + (1.0 - SMOOTHING) * gradient
            price[i] = max(price[i] * np.exp(rate * trend[i]), floor)
