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

from .trws import gather, send, widest


@numba.njit(cache=True, nogil=True)
def needless(slack, unary, off, msg, g, node_cut, pair_cut):  # type: ignore[no-untyped-def]
    """Mark strategies and pairs (by matrix entry of the forward half-edge) of excess above ``slack``; a forward pass of the messages.

    To be called right after a backward pass; ``slack`` is the best known objective minus that pass's bound.
    """
    num, most = len(g.node_off) - 1, widest(g)
    before, share = np.empty(len(unary)), np.empty(num)
    totals, rest, work = np.empty(most), np.empty(most), np.empty(most)
    for v in range(num):
        share[v] = gather(v, unary, off, msg, g, before[g.node_off[v] : g.node_off[v + 1]])
    for v in range(num):
        lo, total = g.node_off[v], totals[: g.node_off[v + 1] - g.node_off[v]]
        gather(v, unary, off, msg, g, total)
        low = total.min()
        for i in range(len(total)):
            total[i] -= low
            if total[i] > slack:
                node_cut[lo + i] = True
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if t > v:
                for j in range(off[h + 1] - off[h]):
                    rest[j] = share[t] * before[g.node_off[t] + j] - msg[off[h] + j]
                _needless_pairs(h, slack, share[v], total, rest[: off[h + 1] - off[h]], off, msg, g, pair_cut)
                send(h, share[v], off, msg, g, total, work)


@numba.njit(cache=True, nogil=True)
def _needless_pairs(h, slack, share, total, rest, off, msg, g, pair_cut):  # type: ignore[no-untyped-def]
    size, width, inward = len(total), len(rest), off[g.back[h]]
    least = np.inf
    for i in range(size):
        a, line = share * total[i] - msg[inward + i], g.matrix[g.at[h] + i * width : g.at[h] + (i + 1) * width]
        for j in range(width):
            value = a + line[j] + rest[j]
            least = value if value < least else least
    for i in range(size):
        a, at = share * total[i] - msg[inward + i], g.at[h] + i * width
        room = slack - (1.0 - share) * total[i] + least
        for j in range(width):
            if a + g.matrix[at + j] + rest[j] > room:
                pair_cut[at + j] = True
