"""Sequential tree-reweighted message passing (TRW-S): lower bounds and roundings of the pairwise part under prices.

Dual: messages ``msg[h]`` from a node over half-edge ``h`` re-distribute costs between nodes and edges without changing the cost of
any selection; after a backward pass the sum of all minima removed on the way is a lower bound of the local polytope's linear program
that never decreases for fixed prices (V. Kolmogorov, "Convergent tree-reweighted message passing for energy minimization", PAMI 2006).
Nodes are visited in index order; a node with ``f`` later and ``b`` earlier neighbours gives each edge the share ``1 / max(f, b)``.
A round of ``forward`` and ``backward`` costs one pass over all matrix entries each; four lines of a matrix are reduced at a time, so that
the running minima stay in registers. The bound of ``backward`` holds for any messages it starts from.
"""

from __future__ import annotations

import numba
import numpy as np

from .graph import Graph


def new_messages(g: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64[2 E + 1] of the messages over each half-edge (one value per strategy of its neighbor), and zeros."""
    sizes = np.diff(g.node_off)[g.neighbor] if len(g.neighbor) else np.zeros(0, dtype=np.int64)
    off = np.zeros(len(g.neighbor) + 1, dtype=np.int64)
    np.cumsum(sizes, out=off[1:])
    return off, np.zeros(int(off[-1]))


@numba.njit(cache=True, nogil=True)
def least_sums(a, matrix, out):  # type: ignore[no-untyped-def]
    """``out[j] = min_i a[i] + matrix[i, j]``; ``matrix`` is flat, its lines are as long as ``out``."""
    width, size, i = len(out), len(a), 0
    out[:] = np.inf
    while i + 4 <= size:
        line0, line1 = matrix[i * width : (i + 1) * width], matrix[(i + 1) * width : (i + 2) * width]
        line2, line3 = matrix[(i + 2) * width : (i + 3) * width], matrix[(i + 3) * width : (i + 4) * width]
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        for j in range(width):
            x0, x1, x2, x3 = a0 + line0[j], a1 + line1[j], a2 + line2[j], a3 + line3[j]
            x0 = x0 if x0 < x1 else x1
            x2 = x2 if x2 < x3 else x3
            x0 = x0 if x0 < x2 else x2
            out[j] = x0 if x0 < out[j] else out[j]
        i += 4
    while i < size:
        line, ai = matrix[i * width : (i + 1) * width], a[i]
        for j in range(width):
            x = ai + line[j]
            out[j] = x if x < out[j] else out[j]
        i += 1


@numba.njit(cache=True, nogil=True)
def gather(v, unary, off, msg, g, total):  # type: ignore[no-untyped-def]
    """Node costs plus all messages to ``v`` into ``total``; returns the share of an edge, ``1 / max(earlier, later)``."""
    size = len(total)
    total[:] = unary[g.node_off[v] : g.node_off[v + 1]]
    later = 0
    for h in range(g.half_off[v], g.half_off[v + 1]):
        base = off[g.back[h]]
        incoming = msg[base : base + size]
        for i in range(size):
            total[i] += incoming[i]
        if g.neighbor[h] > v:
            later += 1
    return 1.0 / max(later, g.half_off[v + 1] - g.half_off[v] - later, 1)


@numba.njit(cache=True, nogil=True)
def send(h, share, off, msg, g, total, work):  # type: ignore[no-untyped-def]
    """New message over half-edge ``h``; returns the constant taken out of it."""
    size, width = len(total), off[h + 1] - off[h]
    base, at = off[g.back[h]], g.at[h]
    incoming, rest, out = msg[base : base + size], work[:size], msg[off[h] : off[h + 1]]
    for i in range(size):
        rest[i] = share * total[i] - incoming[i]
    least_sums(rest, g.matrix[at : at + size * width], out)
    low = out.min()
    for j in range(width):
        out[j] -= low
    return low


@numba.njit(cache=True, nogil=True)
def widest(g):  # type: ignore[no-untyped-def]
    most = 1
    for v in range(len(g.node_off) - 1):
        most = max(most, g.node_off[v + 1] - g.node_off[v])
    return most


@numba.njit(cache=True, nogil=True)
def forward(unary, off, msg, g, x):  # type: ignore[no-untyped-def]
    """Messages to later nodes; ``x`` receives the rounding: each node given the earlier ones."""
    most = widest(g)
    totals, work, score = np.empty(most), np.empty(most), np.empty(most)
    for v in range(len(g.node_off) - 1):
        size = g.node_off[v + 1] - g.node_off[v]
        total, value = totals[:size], score[:size]
        share = gather(v, unary, off, msg, g, total)
        value[:] = unary[g.node_off[v] : g.node_off[v + 1]]
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t, back = g.neighbor[h], g.back[h]
            line = msg[off[back] : off[back] + size] if t > v else g.matrix[g.at[back] + x[t] * size : g.at[back] + (x[t] + 1) * size]
            for i in range(size):
                value[i] += line[i]
        x[v] = value.argmin()
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] > v:
                send(h, share, off, msg, g, total, work)


@numba.njit(cache=True, nogil=True)
def beliefs(unary, off, msg, g, excess):  # type: ignore[no-untyped-def]
    """Messages to later nodes; ``excess`` receives each node's beliefs above their least, when it is visited (see ``lagrange``)."""
    most = widest(g)
    totals, work = np.empty(most), np.empty(most)
    for v in range(len(g.node_off) - 1):
        lo, hi = g.node_off[v], g.node_off[v + 1]
        total = totals[: hi - lo]
        share = gather(v, unary, off, msg, g, total)
        low = total.min()
        for i in range(hi - lo):
            excess[lo + i] = total[i] - low
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] > v:
                send(h, share, off, msg, g, total, work)


@numba.njit(cache=True, nogil=True)
def backward(unary, off, msg, g):  # type: ignore[no-untyped-def]
    """Messages to earlier nodes; returns the lower bound of the priced costs."""
    most = widest(g)
    totals, work = np.empty(most), np.empty(most)
    bound = 0.0
    for v in range(len(g.node_off) - 2, -1, -1):
        total = totals[: g.node_off[v + 1] - g.node_off[v]]
        share = gather(v, unary, off, msg, g, total)
        low = total.min()
        for i in range(len(total)):
            total[i] -= low
        bound += low
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] < v:
                bound += send(h, share, off, msg, g, total, work)
    return bound
