"""Reduced costs of strategies and pairs from message passing: what a better selection cannot use.

After a backward pass the messages split the priced costs into chains through the graph, every edge in one chain and every node in
``n_v = max(earlier, later neighbours)`` of them, and the bound is the sum of the chains' minima. In a forward pass the exact minimum of a
chain through strategy ``i`` of the node just reached is ``D_v[i] / n_v`` (``D_v``: unary plus all messages to ``v``), through pair
``(i, j)`` of edge ``(v, t)`` it is ``D_v[i] / n_v - msg_tv[i] + m[i, j] + R_t[j]`` with ``R_t = D_t / n_t - msg_vt`` taken before the
forward pass. Every selection with ``i`` costs at least the bound plus the excess of all chains through ``v``; with ``(i, j)`` at least that
of the edge's chain at the pair and of the other chains through ``v`` at ``i``. What lies above the best known objective may be forbidden.
"""

from __future__ import annotations

import numba
import numpy as np

from .graph import Graph


@numba.njit(cache=True, nogil=True)
def _total(v, unary, off, msg, g, out):  # type: ignore[no-untyped-def]
    """``D_v`` into ``out``; returns ``n_v``."""
    lo, size = g.node_off[v], g.node_off[v + 1] - g.node_off[v]
    earlier, later = 0, 0
    for i in range(size):
        out[i] = unary[lo + i]
    for h in range(g.half_off[v], g.half_off[v + 1]):
        base = off[g.back[h]]
        for i in range(size):
            out[i] += msg[base + i]
        if g.neighbor[h] > v:
            later += 1
        else:
            earlier += 1
    return max(earlier, later, 1)


@numba.njit(cache=True, nogil=True)
def needless(slack, unary, off, msg, g: Graph, node_cut, pair_cut):  # type: ignore[no-untyped-def]
    """Mark strategies and pairs (by matrix entry of the forward half-edge) of excess above ``slack``; a forward pass of the messages.

    To be called right after a backward pass; ``slack`` is the best known objective minus that pass's bound.
    """
    num = len(g.node_off) - 1
    before, share = np.empty(len(unary)), np.empty(num)
    widest = 1
    for v in range(num):
        widest = max(widest, g.node_off[v + 1] - g.node_off[v])
    total, rest, out = np.empty(widest), np.empty(widest), np.empty(widest)
    for v in range(num):
        share[v] = 1.0 / _total(v, unary, off, msg, g, before[g.node_off[v] : g.node_off[v + 1]])
    for v in range(num):
        lo, size = g.node_off[v], g.node_off[v + 1] - g.node_off[v]
        _total(v, unary, off, msg, g, total)
        low = np.inf
        for i in range(size):
            low = min(low, total[i])
        for i in range(size):
            if total[i] - low > slack:
                node_cut[lo + i] = True
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if t < v:
                continue
            first, width, inward = g.node_off[t], off[h + 1] - off[h], off[g.back[h]]
            for j in range(width):
                rest[j] = share[t] * before[first + j] - msg[off[h] + j]
                out[j] = np.inf
            least, line = np.inf, g.at[h]
            for i in range(size):
                a = share[v] * total[i] - msg[inward + i]
                for j in range(width):
                    value = a + g.matrix[line + j]
                    out[j] = min(out[j], value)
                    least = min(least, value + rest[j])
                line += width
            line = g.at[h]
            for i in range(size):
                a = share[v] * total[i] - msg[inward + i]
                room = slack - (1.0 - share[v]) * (total[i] - low) + least
                for j in range(width):
                    if a + g.matrix[line + j] + rest[j] > room:
                        pair_cut[line + j] = True
                line += width
            low_out = np.inf
            for j in range(width):
                low_out = min(low_out, out[j])
            for j in range(width):
                msg[off[h] + j] = out[j] - low_out
