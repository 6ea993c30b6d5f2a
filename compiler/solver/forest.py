"""Exact dynamic programming on random induced forests, the large move of the local search.

A random set of nodes is grown such that its induced subgraph has no cycle; all other nodes stay. On the forest the best selection
given the rest is found exactly, leaves to roots and back. With noise of scale T on the node costs this is a step of annealing: a
sample near the Boltzmann distribution of the forest given the rest (perturb and minimise).
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def grow_forest(order, limit, half_off, neighbor, tree, parent_half, sequence, mark, reach):  # type: ignore[no-untyped-def]
    """Fill ``sequence`` with the nodes of a maximal induced forest, parents before children; returns how many.

    ``order``: nodes in the order they are tried; ``tree`` and ``mark``: scratch of size N (``tree`` holds -1 outside);
    ``parent_half``: for each node of the forest the half-edge to its parent, -1 for roots.
    """
    n = len(tree)
    for v in range(n):
        tree[v] = -1
        mark[v] = -1
    count = 0
    for k in range(limit):
        v = order[k]
        ok = True
        for h in range(half_off[v], half_off[v + 1]):
            t = neighbor[h]
            if tree[t] >= 0:
                r = t
                while tree[r] != r:
                    tree[r] = tree[tree[r]]
                    r = tree[r]
                if mark[r] == v:
                    ok = False
                    break
                mark[r] = v
        if not ok:
            continue
        for h in range(half_off[v], half_off[v + 1]):
            t = neighbor[h]
            if tree[t] >= 0:
                r = t
                while tree[r] != r:
                    r = tree[r]
                tree[r] = v
        tree[v] = v
        reach[count] = v
        count += 1
    for v in range(n):
        mark[v] = -1
    filled = 0
    for k in range(count):
        v = reach[k]
        if mark[v] >= 0:
            continue
        mark[v] = 1
        parent_half[v] = -1
        sequence[filled] = v
        head = filled
        filled += 1
        while head < filled:
            u = sequence[head]
            head += 1
            for h in range(half_off[u], half_off[u + 1]):
                t = neighbor[h]
                if tree[t] >= 0 and mark[t] < 0:
                    mark[t] = 1
                    sequence[filled] = t
                    filled += 1
                    # the half-edge from child to parent is found from the other side by the caller's ``back``
                    parent_half[t] = h
    return count


@numba.njit(cache=True, nogil=True)
def solve_forest(sequence, count, parent_half, tree, x, unary, noise, scale, node_off, half_off, neighbor, at, back, matrix, belief, choice):  # type: ignore[no-untyped-def]
    """Set ``x`` on the forest to the exact minimum given the rest, with ``scale`` times values from ``noise`` added to each strategy.

    ``unary``: node costs with prices; ``belief`` float64[sum strategies] and ``choice`` int32[sum strategies of parents] are scratch.
    """
    length = len(noise)
    for k in range(count):
        v = sequence[k]
        lo, size = node_off[v], node_off[v + 1] - node_off[v]
        if scale > 0:
            start = np.random.randint(0, length - size + 1)
            for i in range(size):
                belief[lo + i] = unary[lo + i] + scale * noise[start + i]
        else:
            for i in range(size):
                belief[lo + i] = unary[lo + i]
        for h in range(half_off[v], half_off[v + 1]):
            t = neighbor[h]
            if tree[t] < 0:
                base = at[back[h]] + x[t] * size
                for i in range(size):
                    belief[lo + i] += matrix[base + i]
    for k in range(count - 1, -1, -1):
        v = sequence[k]
        h = parent_half[v]
        if h < 0:
            continue
        u = neighbor[back[h]]
        lo, size = node_off[v], node_off[v + 1] - node_off[v]
        up, width = node_off[u], node_off[u + 1] - node_off[u]
        base = at[h]
        for j in range(width):
            line = base + j * size
            best = belief[lo] + matrix[line]
            for i in range(1, size):
                value = belief[lo + i] + matrix[line + i]
                if value < best:
                    best = value
            belief[up + j] += best
    for k in range(count):
        v = sequence[k]
        lo, size = node_off[v], node_off[v + 1] - node_off[v]
        h = parent_half[v]
        best, arg = np.inf, 0
        if h < 0:
            for i in range(size):
                if belief[lo + i] < best:
                    best = belief[lo + i]
                    arg = i
        else:
            u = neighbor[back[h]]
            line = at[h] + x[u] * size
            for i in range(size):
                value = belief[lo + i] + matrix[line + i]
                if value < best:
                    best = value
                    arg = i
        x[v] = arg


@numba.njit(cache=True, nogil=True)
def energy(x, unary, node_off, half_off, neighbor, at, matrix):  # type: ignore[no-untyped-def]
    """Node costs (with whatever prices ``unary`` holds) plus edge costs of ``x``."""
    total = 0.0
    for v in range(len(x)):
        total += unary[node_off[v] + x[v]]
        for h in range(half_off[v], half_off[v + 1]):
            t = neighbor[h]
            if t > v:
                total += matrix[at[h] + x[v] * (node_off[t + 1] - node_off[t]) + x[t]]
    return total
