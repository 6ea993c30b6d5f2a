"""Annealing by blocks: like ``search.anneal``, but a block of the graph at a time, each under the loads that the others leave.

When the whole graph moves at once, chunks of it flip together and the loads swing around the limits, so prices must change slowly. A
block of a fiftieth to a fifth of the nodes sees the true loads, and its prices may react to them at once: each slot's price is raised by
``REACTION`` times its relative overload. The slow part of the prices follows the loads once per sweep (as many moved nodes as there are).
"""

from __future__ import annotations

import numba
import numpy as np

from .forest import beside, clear_forest, forest_energy, forest_streams, grow_forest, solve_forest, true_energy
from .memory import add_prices, fill_loads, load_change
from .search import PRICE_FLOOR, grow_region

REACTION, RATE = 20.0, 0.3


@numba.njit(cache=True, nogil=True)
def _follow(load, price, rows):  # type: ignore[no-untyped-def]
    """The slow step of the prices; returns the mean price of the slots that matter."""
    floor, most, total, num = PRICE_FLOOR * price.sum() / max(len(price), 1), 0.0, 0.0, 0
    for k in range(len(price)):
        over = min(max((load[k] - rows.limit[k]) / rows.scale[k], -1.0), 1.0)
        price[k] = max(price[k] * np.exp(RATE * over), floor)
        most = max(most, price[k])
        total += price[k]
    for k in range(len(price)):
        num += price[k] > 0.01 * most
    return total / max(num, 1)


@numba.njit(cache=True, nogil=True)
def _react(load, price, typical, rows, cum):  # type: ignore[no-untyped-def]
    """Prefix sums of the prices with their reaction to ``load``; returns the largest relative overload."""
    cum[0], most = 0.0, -np.inf
    for k in range(len(price)):
        over = (load[k] - rows.limit[k]) / rows.scale[k]
        most = max(most, over)
        extra = price[k] * max(REACTION * over, -0.9) if over < 0 else typical * REACTION * over
        cum[k + 1] = cum[k] + price[k] + extra
    return most


@numba.njit(cache=True, nogil=True)
def apply_change(diff, lo, hi, load):  # type: ignore[no-untyped-def]
    """Add the difference array to ``load`` over slots ``lo .. hi`` and clear it."""
    run = 0.0
    for k in range(lo, hi):
        run += diff[k]
        load[k] += run
    diff[lo : hi + 1] = 0.0


@numba.njit(cache=True, nogil=True)
def move_forest(candidates, size, heat, cum, x, old, load, diff, stream, g, rows, flow, s):  # type: ignore[no-untyped-def]
    """Solve a forest among the first ``size`` candidates with noise ``heat``; loads and streams follow. Returns its nodes' number and the
    change of energy. ``old`` is work space."""
    count = grow_forest(candidates, size, g, s)
    for k in range(count):
        old[k] = x[s.sequence[k]]
        add_prices(s.sequence[k], cum, 1.0, g, rows, s.unary)
    before = forest_energy(count, x, g, s)
    forest_streams(count, x, -1.0, flow, g, s, stream)
    solve_forest(count, x, heat, g, s)
    change = forest_energy(count, x, g, s) - before
    forest_streams(count, x, 1.0, flow, g, s, stream)
    lo, hi = len(load), 0
    for k in range(count):
        v = s.sequence[k]
        if x[v] != old[k]:
            a, b = load_change(v, old[k], x[v], rows, diff)
            lo, hi = min(lo, a), max(hi, b)
    apply_change(diff, lo, hi, load)
    clear_forest(count, s)
    return count, change


@numba.njit(cache=True, nogil=True)
def anneal_blocks(sweeps, begin, total, hot, cold, x, price, best, state, g, rows, flow, s):  # type: ignore[no-untyped-def]
    """Sweeps ``begin .. begin + sweeps`` of a schedule of ``total``; ``state`` and ``best`` as in ``search.anneal``."""
    num, slots = len(x), len(price)
    load, cum, diff = np.empty(slots), np.empty(slots + 1), np.zeros(slots + 1)
    region, seen, old = np.empty(num, np.int64), np.full(num, -1, np.int64), np.empty(num, np.int64)
    stream = np.empty(len(flow.weight))
    fill_loads(x, rows, load)
    now = true_energy(x, flow, g, stream) - beside(stream, flow)
    stamp = 0
    for sweep in range(begin, begin + sweeps):
        typical, moved = _follow(load, price, rows), 0
        while moved < num:
            heat = hot * (cold / hot) ** ((sweep + moved / num) / total)
            over = _react(load, price, typical, rows, cum)
            if over <= 0 and now + beside(stream, flow) < state[0]:
                state[0] = now + beside(stream, flow)
                best[:] = x
            size = grow_region(np.random.randint(num // 50 + 1, num // 5 + 2), 0, region, seen, stamp, g)
            stamp += 1
            count, change = move_forest(region, size, heat, cum, x, old, load, diff, stream, g, rows, flow, s)
            now += change
            moved += count
    state[1] = now + beside(stream, flow)
