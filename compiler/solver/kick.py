"""Kicks: a costly node is forced to another strategy, the region around it settles under the true loads of the rest, and the result is
kept if it is better.

Costs are heavy-tailed: on a large problem a hundred of 17,000 edges can make up half of the cost, each of them many times what the noise of
annealing overcomes. So where such an edge is paid is decided by the start, and only a forced change moves it. Nodes are drawn in proportion
to their own cost and that of their edges. While the region settles, the node stays as forced; then it may move with the others, with the
prices of passed limits growing until all fits.
"""

from __future__ import annotations

import numba
import numpy as np

from .blocks import apply_change, move_forest
from .forest import beside, forest_energy, forest_streams, true_energy
from .memory import fill_loads, load_change, prefix

SMALLEST, LARGEST = 50, 400
"""Nodes of a region, drawn from a log-uniform distribution; twice the number of the kicked node's neighbours at least."""

FORCED_STEPS, FREE_STEPS = 10, 8
REACTION, PRESSURE, GROWTH = 20.0, 0.5, 1.6
"""What a passed limit adds to a slot's price, in units of the typical price: per relative overload; from the first free step, growing."""

COOLING = 0.02
"""Noise of the last forced step in terms of the first."""


@numba.njit(cache=True, nogil=True)
def _costly(x, g, weight):  # type: ignore[no-untyped-def]
    """A random node, in proportion to its cost and that of its edges."""
    total = 0.0
    for v in range(len(x)):
        here = g.cost[g.node_off[v] + x[v]]
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            here += g.matrix[g.at[h] + x[v] * (g.node_off[t + 1] - g.node_off[t]) + x[t]]
        total += max(here, 0.0)
        weight[v] = total
    if total <= 0.0:
        return np.random.randint(0, len(x))
    return min(np.searchsorted(weight, np.random.random() * total), len(x) - 1)


@numba.njit(cache=True, nogil=True)
def _region(start, size, region, seen, stamp, g):  # type: ignore[no-untyped-def]
    """Up to ``size`` nodes around ``start``, which comes first; returns how many."""
    region[0] = start
    seen[start] = stamp
    found, done = 1, 0
    while done < found and found < size:
        v = region[done]
        done += 1
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if seen[t] != stamp and found < size:
                seen[t] = stamp
                region[found] = t
                found += 1
    return found


@numba.njit(cache=True, nogil=True)
def _typical(price):  # type: ignore[no-untyped-def]
    """Mean price of the slots that matter."""
    most = price.max() if len(price) else 0.0
    total, num = 0.0, 0
    for k in range(len(price)):
        if price[k] > 0.01 * most:
            total += price[k]
            num += 1
    return total / max(num, 1)


@numba.njit(cache=True, nogil=True)
def _press(load, price, factor, typical, pressure, rows, cum):  # type: ignore[no-untyped-def]
    """Prefix sums of ``factor`` times the prices, raised where a limit is passed; returns whether all fits."""
    cum[0], fits = 0.0, True
    for k in range(len(price)):
        over, p = (load[k] - rows.limit[k]) / rows.scale[k], factor * price[k]
        if over > 0:
            p += typical * (REACTION * over + pressure)
            fits = False
        cum[k + 1] = cum[k] + p
    return fits


@numba.njit(cache=True, nogil=True)
def _force(v, new, x, load, diff, stream, g, rows, flow, s):  # type: ignore[no-untyped-def]
    """Give ``v`` the strategy ``new``; returns the change of energy."""
    s.sequence[0] = v
    before, old = forest_energy(1, x, g, s), x[v]
    forest_streams(1, x, -1.0, flow, g, s, stream)
    x[v] = new
    forest_streams(1, x, 1.0, flow, g, s, stream)
    lo, hi = load_change(v, old, new, rows, diff)
    apply_change(diff, lo, hi, load)
    return forest_energy(1, x, g, s) - before


@numba.njit(cache=True, nogil=True)
def _shuffle(items, size):  # type: ignore[no-untyped-def]
    for i in range(size - 1, 0, -1):
        j = np.random.randint(0, i + 1)
        items[i], items[j] = items[j], items[i]


@numba.njit(cache=True, nogil=True)
def kick(count, hot, x, price, state, g, rows, flow, s):  # type: ignore[no-untyped-def]
    """``count`` kicks from the feasible selection ``x``, in place; ``state[0]`` receives its objective without the constant."""
    num, slots = len(x), len(price)
    load, cum, diff, held = np.empty(slots), np.empty(slots + 1), np.zeros(slots + 1), np.empty(slots)
    region, seen, weight = np.empty(num, np.int64), np.full(num, -1, np.int64), np.empty(num)
    old, first, order = np.empty(num, np.int64), x.copy(), np.empty(num, np.int64)
    stream, kept = np.empty(len(flow.weight)), np.empty(len(flow.weight))
    fill_loads(x, rows, load)
    prefix(price, cum)
    now, typical = true_energy(x, flow, g, stream) - beside(stream, flow), _typical(price)
    for stamp in range(count):
        v = _costly(x, g, weight)
        width, degree = g.node_off[v + 1] - g.node_off[v], g.half_off[v + 1] - g.half_off[v]
        if width < 2:
            continue
        size = max(int(SMALLEST * (LARGEST / SMALLEST) ** np.random.random()), 2 * degree)
        size = _region(v, min(size, num), region, seen, stamp, g)
        order[:size] = region[:size]
        held[:], kept[:], start = load, stream, now
        heat, factor = hot * 10.0 ** (-np.random.random()), 0.7 + 0.6 * np.random.random()
        now += _force(v, (x[v] + np.random.randint(1, width)) % width, x, load, diff, stream, g, rows, flow, s)
        better = False
        for step in range(FORCED_STEPS + FREE_STEPS):
            forced = step < FORCED_STEPS
            pressure = 0.0 if forced else PRESSURE * GROWTH ** (step - FORCED_STEPS)
            _press(load, price, factor, typical, pressure, rows, cum)
            if step == FORCED_STEPS:
                order[0] = v  # with the others from now on
            free = order[1:] if forced else order
            _shuffle(free, size - forced)
            noise = heat * COOLING ** (step / FORCED_STEPS) if forced else 0.0
            now += move_forest(free, size - forced, noise, cum, x, old, load, diff, stream, g, rows, flow, s)[1]
            if not forced and now + beside(stream, flow) < start + beside(kept, flow) and _press(load, price, 1.0, 0.0, 0.0, rows, cum):
                better = True
                break
        for k in range(size):
            if better:
                first[region[k]] = x[region[k]]
            else:
                x[region[k]] = first[region[k]]
        if not better:
            load[:], stream[:], now = held, kept, start
    state[0] = true_energy(x, flow, g, stream)
