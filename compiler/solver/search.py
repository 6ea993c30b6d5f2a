"""Local search for large remainders: annealing over whole forests with memory prices, then refinement under the true limits.

``anneal``: every step solves a random induced forest of the whole graph exactly, with noise that shrinks geometrically. Memory enters
through prices per slot that grow where the load is above the limit and shrink where it is below (multiplicative weights), so costs
and memory find their balance while the noise goes down.

``refine``: forests of small regions. A proposal uses the prices (times a random factor) and is accepted by its true change of cost plus a
penalty on bytes above the limit; the penalty grows while there are any, so the result is feasible if that can be had.
"""

from __future__ import annotations

import numba
import numpy as np

from .forest import beside, clear_forest, forest_energy, forest_streams, grow_forest, solve_forest, true_energy
from .memory import add_prices, fill_loads, load_change, prefix

PRICE_FLOOR = 1e-4
"""Prices never fall below this fraction of their mean, so that a slot which starts to bind late is noticed in time."""


EXCHANGE = 0.3
"""Share of region moves that change two regions at once, each with its own factor on the prices: one gives the bytes the other takes."""


@numba.njit(cache=True, nogil=True)
def anneal(steps, start, total, hot, cold, rate, x, price, best, state, g, rows, flow, s):  # type: ignore[no-untyped-def]
    """Steps ``start .. start + steps`` of a schedule of ``total``; ``state``: [best objective without constant, the last one, last relative
    overload].

    ``hot``/``cold``: noise at both ends; ``rate``: the prices' step. ``best`` receives the cheapest feasible selection met.
    """
    num, slots = len(x), len(price)
    load, cum, order, stream = np.empty(slots), np.empty(slots + 1), np.arange(num), np.empty(len(flow.weight))
    for k in range(start, start + steps):
        noise = hot * (cold / hot) ** (k / total) if hot > 0 else 0.0
        for i in range(num - 1, 0, -1):
            j = np.random.randint(0, i + 1)
            order[i], order[j] = order[j], order[i]
        prefix(price, cum)
        for v in range(num):
            add_prices(v, cum, 1.0, g, rows, s.unary)
        count = grow_forest(order, num, g, s)
        solve_forest(count, x, noise, g, s)
        clear_forest(count, s)
        fill_loads(x, rows, load)
        over, floor = 0.0, PRICE_FLOOR * price.sum() / max(slots, 1)
        for i in range(slots):
            gradient = (load[i] - rows.limit[i]) / rows.scale[i]
            over = max(over, gradient)
            price[i] = max(price[i] * np.exp(rate * min(max(gradient, -1.0), 1.0)), floor)
        state[1], state[2] = true_energy(x, flow, g, stream), over
        if over <= 0 and state[1] < state[0]:
            state[0] = state[1]
            best[:] = x


@numba.njit(cache=True, nogil=True)
def grow_region(size, begin, region, seen, stamp, g):  # type: ignore[no-untyped-def]
    """Add a connected random region of up to ``size`` nodes to ``region[:begin]``; returns how many there are now."""
    start = np.random.randint(0, len(region))
    if seen[start] == stamp:
        return begin
    region[begin] = start
    seen[start] = stamp
    found, done, size = begin + 1, begin, begin + size
    while done < found and done < size:
        pick = np.random.randint(done, found)
        region[done], region[pick] = region[pick], region[done]
        v = region[done]
        done += 1
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if seen[t] != stamp:
                seen[t] = stamp
                region[found] = t
                found += 1
    return done


@numba.njit(cache=True, nogil=True)
def overload(load, rows):  # type: ignore[no-untyped-def]
    total = 0.0
    for k in range(len(load)):
        if load[k] > rows.limit[k]:
            total += load[k] - rows.limit[k]
    return total


@numba.njit(cache=True, nogil=True)
def _penalty_change(lo, hi, diff, load, rows):  # type: ignore[no-untyped-def]
    """Change of the bytes above the limits, summed over slots, if the differences in ``diff`` are applied."""
    run, change = 0.0, 0.0
    for k in range(lo, hi):
        run += diff[k]
        if run != 0:
            change += max(load[k] + run - rows.limit[k], 0.0) - max(load[k] - rows.limit[k], 0.0)
    return change


@numba.njit(cache=True, nogil=True)
def _update_prices(load, rate, penalty, price, weights, rows):  # type: ignore[no-untyped-def]
    """Prices follow the loads a little; ``weights`` are the prices plus the penalty where a limit is passed."""
    for k in range(len(load)):
        if rate > 0:
            price[k] *= np.exp(rate * min((load[k] - rows.limit[k]) / rows.scale[k], 1.0))
        weights[k] = price[k] + (penalty if load[k] > rows.limit[k] else 0.0)


@numba.njit(cache=True, nogil=True)
def refine(steps, start, total, smallest, largest, hot, cold, rate, x, price, best, state, g, rows, flow, s):  # type: ignore[no-untyped-def]
    """Region moves ``start .. start + steps`` of a schedule of ``total`` from ``x``.

    ``state``: [best objective without constant, that of x, overload of x in bytes x slots, penalty per byte and slot above the limit].
    ``hot``/``cold``: the temperature at both ends (noise of proposals and accepted worsening), 0 for strict descent; ``rate``: the prices'
    step.
    """
    num, slots, exchange = len(x), len(price), EXCHANGE if len(price) + len(flow.weight) else 0.0
    load, cum, diff, weights = np.empty(slots), np.empty(slots + 1), np.zeros(slots + 1), np.empty(slots)
    region, seen, old = np.empty(num, np.int64), np.full(num, -1, np.int64), np.empty(num, np.int64)
    stream, moved = np.empty(len(flow.weight)), np.empty(len(flow.weight))
    fill_loads(x, rows, load)
    over, now, penalty, least_penalty = overload(load, rows), true_energy(x, flow, g, stream), state[3], state[3]
    for step in range(start, start + steps):
        heat = hot * (cold / hot) ** (step / total) if hot > 0 else 0.0
        if (step - start) % 200 == 0:
            if step > start:
                penalty = penalty * 1.1 if over > 0 else max(penalty * 0.98, least_penalty)
            _update_prices(load, rate, penalty, price, weights, rows)
            prefix(weights, cum)
        size = grow_region(np.random.randint(smallest, largest + 1), 0, region, seen, step, g)
        factor, other = 1.5 * np.random.random(), 1.5 * np.random.random()
        for k in range(size):
            add_prices(region[k], cum, factor, g, rows, s.unary)
        both = grow_region(np.random.randint(smallest, largest + 1), size, region, seen, step, g) if np.random.random() < exchange else size
        for k in range(size, both):
            add_prices(region[k], cum, other, g, rows, s.unary)
        count = grow_forest(region, both, g, s)
        for k in range(count):
            old[k] = x[s.sequence[k]]
        before = forest_energy(count, x, g, s) + beside(stream, flow)
        moved[:] = stream
        forest_streams(count, x, -1.0, flow, g, s, moved)
        solve_forest(count, x, heat, g, s)
        forest_streams(count, x, 1.0, flow, g, s, moved)
        change = forest_energy(count, x, g, s) + beside(moved, flow) - before
        lo, hi = slots, 0
        for k in range(count):
            v = s.sequence[k]
            if x[v] != old[k]:
                a, b = load_change(v, old[k], x[v], rows, diff)
                lo, hi = min(lo, a), max(hi, b)
        limit = -heat * np.log(1.0 - np.random.random()) if heat > 0 else 0.0
        excess, ok = 0.0, change <= limit or over > 0
        if ok:
            excess = _penalty_change(lo, hi, diff, load, rows)
            ok = change + penalty * excess <= limit
        if ok:
            run = 0.0
            for k in range(lo, hi):
                run += diff[k]
                load[k] += run
            now += change
            stream[:] = moved
            if excess != 0:
                over = overload(load, rows)
            if over <= 0 and now < state[0]:
                state[0] = now
                best[:] = x
        else:
            for k in range(count):
                x[s.sequence[k]] = old[k]
        diff[lo : hi + 1] = 0.0
        clear_forest(count, s)
    state[1], state[2], state[3] = now, over, penalty


@numba.njit(cache=True, nogil=True)
def set_seed(seed):  # type: ignore[no-untyped-def]
    np.random.seed(seed)
