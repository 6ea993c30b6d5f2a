"""Sequential tree-reweighted message passing (TRW-S): lower bounds and roundings of the pairwise part under prices.

Dual: messages ``msg[h]`` from a node over half-edge ``h`` re-distribute costs between nodes and edges without changing the cost of
any selection; after a backward pass the sum of all minima removed on the way is a lower bound of the local polytope's linear program
that never decreases for fixed prices (V. Kolmogorov, "Convergent tree-reweighted message passing for energy minimization", PAMI 2006).
Nodes are visited in index order; a node with ``f`` later and ``b`` earlier neighbours gives each edge the share ``1 / max(f, b)``.
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
def _gather(v, unary, off, msg, g, total):  # type: ignore[no-untyped-def]
    lo, size = g.node_off[v], g.node_off[v + 1] - g.node_off[v]
    for i in range(size):
        total[i] = unary[lo + i]
    for h in range(g.half_off[v], g.half_off[v + 1]):
        base = off[g.back[h]]
        for i in range(size):
            total[i] += msg[base + i]
    return size


@numba.njit(cache=True, nogil=True)
def _send(h, size, share, off, msg, g, total, out):  # type: ignore[no-untyped-def]
    """New message over half-edge ``h``; returns the constant taken out of it."""
    width = off[h + 1] - off[h]
    incoming, line = off[g.back[h]], g.at[h]
    for j in range(width):
        out[j] = np.inf
    for i in range(size):
        a = share * total[i] - msg[incoming + i]
        for j in range(width):
            value = a + g.matrix[line + j]
            out[j] = value if value < out[j] else out[j]
        line += width
    low = np.inf
    for j in range(width):
        low = min(low, out[j])
    for j in range(width):
        msg[off[h] + j] = out[j] - low
    return low


@numba.njit(cache=True, nogil=True)
def forward(unary, off, msg, g, x):  # type: ignore[no-untyped-def]
    """Messages to later nodes; ``x`` receives the rounding: each node given the earlier ones."""
    widest = 1
    for v in range(len(g.node_off) - 1):
        widest = max(widest, g.node_off[v + 1] - g.node_off[v])
    total, out = np.empty(widest), np.empty(widest)
    for v in range(len(g.node_off) - 1):
        size = _gather(v, unary, off, msg, g, total)
        lo = g.node_off[v]
        later, earlier = 0, 0
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] > v:
                later += 1
            else:
                earlier += 1
        for i in range(size):
            out[i] = unary[lo + i]
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            base = off[g.back[h]] if t > v else g.at[g.back[h]] + x[t] * size
            for i in range(size):
                out[i] += msg[base + i] if t > v else g.matrix[base + i]
        arg = 0
        for i in range(1, size):
            if out[i] < out[arg]:
                arg = i
        x[v] = arg
        share = 1.0 / max(later, earlier, 1)
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] > v:
                _send(h, size, share, off, msg, g, total, out)


@numba.njit(cache=True, nogil=True)
def backward(unary, off, msg, g):  # type: ignore[no-untyped-def]
    """Messages to earlier nodes; returns the lower bound of the priced costs."""
    widest = 1
    for v in range(len(g.node_off) - 1):
        widest = max(widest, g.node_off[v + 1] - g.node_off[v])
    total, out = np.empty(widest), np.empty(widest)
    bound = 0.0
    for v in range(len(g.node_off) - 2, -1, -1):
        size = _gather(v, unary, off, msg, g, total)
        later, earlier, low = 0, 0, np.inf
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] > v:
                later += 1
            else:
                earlier += 1
        for i in range(size):
            low = min(low, total[i])
        for i in range(size):
            total[i] -= low
        bound += low
        share = 1.0 / max(later, earlier, 1)
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] < v:
                bound += _send(h, size, share, off, msg, g, total, out)
    return bound


@numba.njit(cache=True, nogil=True)
def node_beliefs(unary, off, msg, g, x):  # type: ignore[no-untyped-def]
    """A forward pass that also returns ``D[i] - min D`` of every node at its visit (see ``lagrange``: fixing)."""
    excess = np.zeros(len(unary))
    widest = 1
    for v in range(len(g.node_off) - 1):
        widest = max(widest, g.node_off[v + 1] - g.node_off[v])
    total, out = np.empty(widest), np.empty(widest)
    for v in range(len(g.node_off) - 1):
        size = _gather(v, unary, off, msg, g, total)
        lo, low = g.node_off[v], np.inf
        later, earlier = 0, 0
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] > v:
                later += 1
            else:
                earlier += 1
        for i in range(size):
            low = min(low, total[i])
        for i in range(size):
            excess[lo + i] = total[i] - low
        share = 1.0 / max(later, earlier, 1)
        for h in range(g.half_off[v], g.half_off[v + 1]):
            if g.neighbor[h] > v:
                _send(h, size, share, off, msg, g, total, out)
    return excess
