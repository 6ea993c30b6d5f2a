"""Loads of slots and prices of usage rows, in full and by differences.

``load[k]`` is the bytes in slot k; ``cum`` (float64[K + 1]) holds prefix sums of the slots' prices, so the price per byte of a row is
``cum[end] - cum[start]``.
"""

from __future__ import annotations

import numba


@numba.njit(cache=True, nogil=True)
def fill_loads(x, rows, load):  # type: ignore[no-untyped-def]
    num = len(load)
    load[:] = 0.0
    for r in range(len(rows.node)):
        size = rows.bytes[rows.off[r] + x[rows.node[r]]]
        if size != 0:
            load[rows.start[r]] += size
            if rows.end[r] < num:
                load[rows.end[r]] -= size
    for k in range(1, num):
        load[k] += load[k - 1]


@numba.njit(cache=True, nogil=True)
def prefix(price, cum):  # type: ignore[no-untyped-def]
    cum[0] = 0.0
    for k in range(len(price)):
        cum[k + 1] = cum[k] + price[k]


@numba.njit(cache=True, nogil=True)
def add_prices(v, cum, weight, g, rows, unary):  # type: ignore[no-untyped-def]
    """Set ``unary`` of node ``v`` to its costs plus ``weight`` times the price of its bytes."""
    lo, size = g.node_off[v], g.node_off[v + 1] - g.node_off[v]
    for i in range(size):
        unary[lo + i] = g.cost[lo + i]
    for q in range(rows.node_off[v], rows.node_off[v + 1]):
        r = rows.of_node[q]
        p = weight * (cum[rows.end[r]] - cum[rows.start[r]])
        if p > 0:
            for i in range(size):
                unary[lo + i] += p * rows.bytes[rows.off[r] + i]


@numba.njit(cache=True, nogil=True)
def load_change(v, old, new, rows, diff):  # type: ignore[no-untyped-def]
    """Add the change of node ``v`` to the difference array ``diff`` (float64[K + 1]); returns the range of slots touched."""
    lo, hi = len(diff), 0
    for q in range(rows.node_off[v], rows.node_off[v + 1]):
        r = rows.of_node[q]
        d = rows.bytes[rows.off[r] + new] - rows.bytes[rows.off[r] + old]
        if d != 0:
            diff[rows.start[r]] += d
            diff[rows.end[r]] -= d
            lo = min(lo, rows.start[r])
            hi = max(hi, rows.end[r])
    return lo, hi
