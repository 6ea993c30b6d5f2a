"""Exact dynamic programming on random induced forests, the large move of the local search.

A random set of nodes is grown such that its induced subgraph has no cycle; all other nodes stay. On the forest the best selection
given the rest is found exactly, leaves to roots and back. With noise of scale T on the node costs this is a step of annealing: a
sample near the Boltzmann distribution of the forest given the rest (perturb and minimise).
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from .graph import Graph


class Scratch(NamedTuple):
    """Work space of the kernels. Between calls ``tree`` and ``mark`` hold -1 everywhere."""

    tree: np.ndarray  # int64[N]: union-find parent of the nodes in the forest, -1 outside
    mark: np.ndarray  # int64[N]
    chosen: np.ndarray  # int64[N]: nodes of the forest as they came
    sequence: np.ndarray  # int64[N]: nodes of the forest, parents before children
    parent: np.ndarray  # int64[N]: half-edge from the parent to this node, -1 for roots
    belief: np.ndarray  # float64[sum strategies]
    unary: np.ndarray  # float64[sum strategies]: node costs with prices
    noise: np.ndarray  # float64: negated Gumbel samples


def new_scratch(graph: Graph, seed: int) -> Scratch:
    n, total = len(graph.node_off) - 1, len(graph.cost)
    widest = int(np.diff(graph.node_off).max(initial=1))
    noise = -np.random.default_rng(seed).gumbel(size=max(1 << 16, 4 * widest))
    return Scratch(
        np.full(n, -1, dtype=np.int64),
        np.full(n, -1, dtype=np.int64),
        np.zeros(n, dtype=np.int64),
        np.zeros(n, dtype=np.int64),
        np.zeros(n, dtype=np.int64),
        np.zeros(total),
        graph.cost.copy(),
        noise,
    )


@numba.njit(cache=True, nogil=True)
def _root(tree, v):  # type: ignore[no-untyped-def]
    while tree[v] != v:
        tree[v] = tree[tree[v]]
        v = tree[v]
    return v


@numba.njit(cache=True, nogil=True)
def grow_forest(order, limit, g, s):  # type: ignore[no-untyped-def]
    """Take the first ``limit`` nodes of ``order`` that close no cycle; fill ``sequence`` and ``parent``, return how many."""
    count = 0
    for k in range(limit):
        v = order[k]
        ok = True
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if s.tree[t] >= 0:
                r = _root(s.tree, t)
                if s.mark[r] == v:
                    ok = False
                    break
                s.mark[r] = v
        if not ok:
            continue
        s.tree[v] = v
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if s.tree[t] >= 0 and t != v:
                s.tree[_root(s.tree, t)] = v
        s.chosen[count] = v
        count += 1
    for k in range(count):
        s.mark[s.chosen[k]] = -1
    filled = 0
    for k in range(count):
        v = s.chosen[k]
        if s.mark[v] >= 0:
            continue
        s.mark[v] = 1
        s.parent[v] = -1
        s.sequence[filled] = v
        head = filled
        filled += 1
        while head < filled:
            u = s.sequence[head]
            head += 1
            for h in range(g.half_off[u], g.half_off[u + 1]):
                t = g.neighbor[h]
                if s.tree[t] >= 0 and s.mark[t] < 0:
                    s.mark[t] = 1
                    s.sequence[filled] = t
                    filled += 1
                    s.parent[t] = h
    return count


@numba.njit(cache=True, nogil=True)
def clear_forest(count, s):  # type: ignore[no-untyped-def]
    for k in range(count):
        s.tree[s.sequence[k]] = -1
        s.mark[s.sequence[k]] = -1


@numba.njit(cache=True, nogil=True)
def solve_forest(count, x, scale, g, s):  # type: ignore[no-untyped-def]
    """Set ``x`` on the forest to the exact minimum given the rest, with ``scale`` times noise added to each strategy."""
    length = len(s.noise)
    for k in range(count):
        v = s.sequence[k]
        lo, size = g.node_off[v], g.node_off[v + 1] - g.node_off[v]
        if scale > 0:
            start = np.random.randint(0, length - size + 1)
            for i in range(size):
                s.belief[lo + i] = s.unary[lo + i] + scale * s.noise[start + i]
        else:
            for i in range(size):
                s.belief[lo + i] = s.unary[lo + i]
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if s.tree[t] < 0:
                base = g.at[g.back[h]] + x[t] * size
                for i in range(size):
                    s.belief[lo + i] += g.matrix[base + i]
    for k in range(count - 1, -1, -1):
        v = s.sequence[k]
        h = s.parent[v]
        if h < 0:
            continue
        u = g.neighbor[g.back[h]]
        lo, size = g.node_off[v], g.node_off[v + 1] - g.node_off[v]
        up, width = g.node_off[u], g.node_off[u + 1] - g.node_off[u]
        for j in range(width):
            line = g.at[h] + j * size
            best = s.belief[lo] + g.matrix[line]
            for i in range(1, size):
                best = min(best, s.belief[lo + i] + g.matrix[line + i])
            s.belief[up + j] += best
    for k in range(count):
        v = s.sequence[k]
        lo, size = g.node_off[v], g.node_off[v + 1] - g.node_off[v]
        h = s.parent[v]
        line = g.at[h] + x[g.neighbor[g.back[h]]] * size if h >= 0 else 0
        best, arg = np.inf, 0
        for i in range(size):
            value = s.belief[lo + i] + (g.matrix[line + i] if h >= 0 else 0.0)
            if value < best:
                best = value
                arg = i
        x[v] = arg


@numba.njit(cache=True, nogil=True)
def energy(x, g):  # type: ignore[no-untyped-def]
    """Node costs (without prices) plus edge costs of ``x``."""
    total = 0.0
    for v in range(len(x)):
        total += g.cost[g.node_off[v] + x[v]]
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if t > v:
                total += g.matrix[g.at[h] + x[v] * (g.node_off[t + 1] - g.node_off[t]) + x[t]]
    return total


@numba.njit(cache=True, nogil=True)
def forest_energy(count, x, g, s):  # type: ignore[no-untyped-def]
    """The part of ``energy`` that the nodes of the forest take part in."""
    total = 0.0
    for k in range(count):
        v = s.sequence[k]
        total += g.cost[g.node_off[v] + x[v]]
        size = g.node_off[v + 1] - g.node_off[v]
        for h in range(g.half_off[v], g.half_off[v + 1]):
            t = g.neighbor[h]
            if s.tree[t] < 0 or t > v:
                total += g.matrix[g.at[g.back[h]] + x[t] * size + x[v]]
    return total


@numba.njit(cache=True, nogil=True)
def forest_streams(count, x, sign, flow, g, s, out):  # type: ignore[no-untyped-def]
    """Add ``sign`` times the stream seconds that the nodes of the forest take part in to ``out`` (float64[S])."""
    for c in range(len(out)):
        total = 0.0
        for k in range(count):
            v = s.sequence[k]
            total += flow.node[c, g.node_off[v] + x[v]]
            size = g.node_off[v + 1] - g.node_off[v]
            for h in range(g.half_off[v], g.half_off[v + 1]):
                t = g.neighbor[h]
                if s.tree[t] < 0 or t > v:
                    total += flow.edge[c, g.at[g.back[h]] + x[t] * size + x[v]]
        out[c] += sign * total


@numba.njit(cache=True, nogil=True)
def fill_streams(x, flow, g, out):  # type: ignore[no-untyped-def]
    """Seconds on each stream under ``x``."""
    for c in range(len(out)):
        total = flow.constant[c]
        for v in range(len(x)):
            total += flow.node[c, g.node_off[v] + x[v]]
            for h in range(g.half_off[v], g.half_off[v + 1]):
                t = g.neighbor[h]
                if t > v:
                    total += flow.edge[c, g.at[h] + x[v] * (g.node_off[t + 1] - g.node_off[t]) + x[t]]
        out[c] = total


@numba.njit(cache=True, nogil=True)
def beside(stream, flow):  # type: ignore[no-untyped-def]
    """What the busiest stream adds, less what the costs hold of the streams already."""
    most, held = 0.0, 0.0
    for c in range(len(stream)):
        most = max(most, stream[c])
        held += flow.weight[c] * (stream[c] - flow.constant[c])
    return most - held


@numba.njit(cache=True, nogil=True)
def true_energy(x, flow, g, stream):  # type: ignore[no-untyped-def]
    """The objective of ``x`` without the model's constant; ``stream`` (float64[S]) receives the seconds on each stream."""
    fill_streams(x, flow, g, stream)
    return energy(x, g) + beside(stream, flow)
