"""Single reductions, each exact: forbidding entries and strategies that no optimal selection needs.

Every function keeps at least one optimal selection; ``presolve`` calls them in rounds. The kernels walk flat arrays; ``adj`` is the
incidence of edges: ``adj_edge[adj_off[n]:adj_off[n + 1]]`` are the edges of node ``n``.
"""

from __future__ import annotations

import numba
import numpy as np

from .model import Model, row_extremes

MOST_GROWTH = 8
"""Entries that tying a node to its parent may add to its other edges, in units of the entries of the edge that goes."""


def adjacency(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Incident edges of each node: offsets int64[N + 1] and edge indices int64[2 E]."""
    ends = np.concatenate([model.edge_u, model.edge_v])
    order = np.argsort(ends, kind="stable")
    off = np.zeros(model.num_nodes + 1, dtype=np.int64)
    np.cumsum(np.bincount(ends, minlength=model.num_nodes), out=off[1:])
    return off, (order % max(model.num_edges, 1)).astype(np.int64)


def row_index(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Usage rows of each node: offsets int64[N + 1] and row indices."""
    off = np.zeros(model.num_nodes + 1, dtype=np.int64)
    np.cumsum(np.bincount(model.row_node, minlength=model.num_nodes), out=off[1:])
    return off, np.argsort(model.row_node, kind="stable").astype(np.int64)


def forbid_unsupported(model: Model) -> None:
    """Arc consistency, in place: a strategy without an allowed pair on one of its edges is forbidden, and its pairs with it."""
    off, edges = adjacency(model)
    _arc_consistency(model.node_off, model.cost, model.edge_u, model.edge_v, model.edge_off, model.edge_cost, off, edges)


@numba.njit(cache=True, nogil=True)
def _arc_consistency(node_off, cost, eu, ev, edge_off, mat, adj_off, adj_edge):  # type: ignore[no-untyped-def]
    num_edges = len(eu)
    queued = np.ones(num_edges, np.bool_)
    queue = np.empty(num_edges, np.int64)
    for e in range(num_edges):
        queue[e] = e
    head, count = 0, num_edges
    while count > 0:
        e = queue[head]
        head = (head + 1) % num_edges
        count -= 1
        queued[e] = False
        u, v = eu[e], ev[e]
        u0, v0 = node_off[u], node_off[v]
        nu, nv = node_off[u + 1] - u0, node_off[v + 1] - v0
        supported = np.zeros(nv, np.bool_)
        changed_u, changed_v = False, False
        for i in range(nu):
            base = edge_off[e] + i * nv
            if cost[u0 + i] == np.inf:
                for j in range(nv):
                    mat[base + j] = np.inf
                continue
            some = False
            for j in range(nv):
                if cost[v0 + j] == np.inf:
                    mat[base + j] = np.inf
                elif mat[base + j] != np.inf:
                    some = True
                    supported[j] = True
            if not some:
                cost[u0 + i] = np.inf
                changed_u = True
        for j in range(nv):
            if not supported[j] and cost[v0 + j] != np.inf:
                cost[v0 + j] = np.inf
                changed_v = True
        for side in range(2):
            if (side == 0 and not changed_u) or (side == 1 and not changed_v):
                continue
            n = u if side == 0 else v
            for k in range(adj_off[n], adj_off[n + 1]):
                f = adj_edge[k]
                if not queued[f]:
                    queued[f] = True
                    queue[(head + count) % num_edges] = f
                    count += 1


def forbid_oversized(model: Model) -> None:
    """In place: a strategy whose bytes in one row do not fit even if all other rows are at their smallest is forbidden."""
    if len(model.row_node) == 0:
        return
    slack = model.slot_limit - model.least_loads()
    least = row_extremes(model.row_off, model.row_bytes)[0]
    room = _range_min(slack, model.row_start, model.row_end)
    length = np.diff(model.row_off)
    too_big = model.row_bytes - np.repeat(least, length) > np.repeat(room, length)
    rows = np.repeat(np.arange(len(length)), length)[too_big]
    strategy = np.flatnonzero(too_big) - model.row_off[rows]
    model.cost[model.node_off[model.row_node[rows]] + strategy] = np.inf


@numba.njit(cache=True, nogil=True)
def _range_min(values, start, end):  # type: ignore[no-untyped-def]
    n, levels = len(values), 1
    while (1 << levels) <= n:
        levels += 1
    table = np.empty((levels, n))
    table[0] = values
    for k in range(1, levels):
        for i in range(n - (1 << k) + 1):
            table[k, i] = min(table[k - 1, i], table[k - 1, i + (1 << (k - 1))])
    out = np.empty(len(start))
    for r in range(len(start)):
        k = 0
        while (2 << k) <= end[r] - start[r]:
            k += 1
        out[r] = min(table[k, start[r]], table[k, end[r] - (1 << k)])
    return out


def drop_separable(model: Model) -> Model:
    """Edges that are sums of node costs, ``m[i, j] = a[i] + b[j]`` (streams too), become those node costs."""
    if model.num_edges == 0:
        return model
    channels = np.vstack([model.edge_cost[None, :], model.edge_stream])
    nodes = np.vstack([model.cost[None, :], model.node_stream])
    gone = _separable(model.node_off, model.edge_u, model.edge_v, model.edge_off, channels, nodes)
    if not gone.any():
        return model
    keep = ~gone
    length = np.diff(model.edge_off)
    entries = np.repeat(keep, length)
    model.cost, model.node_stream = nodes[0].copy(), nodes[1:].copy()
    model.edge_u, model.edge_v = model.edge_u[keep], model.edge_v[keep]
    model.edge_cost, model.edge_stream = model.edge_cost[entries], model.edge_stream[:, entries].copy()
    model.edge_off = np.concatenate([[0], np.cumsum(length[keep])])
    return model


@numba.njit(cache=True, nogil=True)
def _separable(node_off, eu, ev, edge_off, mat, nodes):  # type: ignore[no-untyped-def]
    gone = np.zeros(len(eu), np.bool_)
    for e in range(len(eu)):
        u, v, base = eu[e], ev[e], edge_off[e]
        nu, nv = node_off[u + 1] - node_off[u], node_off[v + 1] - node_off[v]
        ok = True
        for c in range(mat.shape[0]):
            for i in range(nu):
                shift = mat[c, base + i * nv] - mat[c, base]
                for j in range(nv):
                    m = mat[c, base + i * nv + j]
                    # rounding of a few units in the last place of the entries involved is no difference
                    if m == np.inf or abs(m - mat[c, base + j] - shift) > 1e-15 * (abs(m) + abs(mat[c, base + j])):
                        ok = False
                        break
                if not ok:
                    break
            if not ok:
                break
        if not ok:
            continue
        gone[e] = True
        for c in range(mat.shape[0]):
            for i in range(nu):
                nodes[c, node_off[u] + i] += mat[c, base + i * nv] - mat[c, base]
            for j in range(nv):
                nodes[c, node_off[v] + j] += mat[c, base + j]
    return gone


def forbid_dominated(model: Model, max_pairs: int = 4_000_000) -> int:
    """In place: forbid a strategy that another of the same node always replaces at no more cost, bytes or stream seconds.

    ``j`` replaces ``i`` if ``cost[j] - cost[i] + sum over edges of max_k (m[j, k] - m[i, k]) <= 0`` over the pairs allowed for ``i``,
    the same holds for each stream, and each usage row has no more bytes. Returns how many were forbidden.
    """
    off, edges = adjacency(model)
    row_off, rows = row_index(model)
    channels = np.vstack([model.edge_cost[None, :], model.edge_stream])
    nodes = np.vstack([model.cost[None, :], model.node_stream])
    found = _dominated(
        model.node_off, nodes, model.edge_u, model.edge_v, model.edge_off, channels, off, edges,
        row_off, rows, model.row_off, model.row_bytes, max_pairs,
    )  # fmt: skip
    model.cost[found] = np.inf
    return len(found)


@numba.njit(cache=True, nogil=True)
def _dominated(node_off, nodes, eu, ev, edge_off, mat, adj_off, adj_edge, nrow_off, nrow, row_off, row_bytes, max_pairs):  # type: ignore[no-untyped-def]
    found = np.empty(len(nodes[0]), np.int64)
    num_found = 0
    for n in range(len(node_off) - 1):
        base, size = node_off[n], node_off[n + 1] - node_off[n]
        if size * size > max_pairs:
            continue
        for i in range(size):
            if nodes[0, base + i] == np.inf:
                continue
            for j in range(size):
                if j == i or nodes[0, base + j] == np.inf:
                    continue
                fits = True
                for k in range(nrow_off[n], nrow_off[n + 1]):
                    at = row_off[nrow[k]]
                    if row_bytes[at + j] > row_bytes[at + i]:
                        fits = False
                        break
                if fits and _replaces(n, i, j, node_off, nodes, eu, ev, edge_off, mat, adj_off, adj_edge):
                    nodes[0, base + i] = np.inf
                    found[num_found] = base + i
                    num_found += 1
                    break
    return found[:num_found]


@numba.njit(cache=True, nogil=True)
def _replaces(n, i, j, node_off, nodes, eu, ev, edge_off, mat, adj_off, adj_edge):  # type: ignore[no-untyped-def]
    base = node_off[n]
    for c in range(mat.shape[0]):
        worst = nodes[c, base + j] - nodes[c, base + i]
        for k in range(adj_off[n], adj_off[n + 1]):
            e = adj_edge[k]
            if eu[e] == n:
                other, stride, step = ev[e], 1, node_off[ev[e] + 1] - node_off[ev[e]]
            else:
                other, stride, step = eu[e], node_off[n + 1] - base, 1
            most = -np.inf
            for t in range(node_off[other + 1] - node_off[other]):
                if nodes[0, node_off[other] + t] == np.inf or mat[0, edge_off[e] + t * stride + i * step] == np.inf:
                    continue
                if mat[0, edge_off[e] + t * stride + j * step] == np.inf:
                    return False
                most = max(most, mat[c, edge_off[e] + t * stride + j * step] - mat[c, edge_off[e] + t * stride + i * step])
            worst += most
        if worst > 0:
            return False
    return True


def forbid_leaf_pairs(model: Model) -> int:
    """In place: on the edge of a node of degree one, forbid pairs (i, j) for which another (i, j') is no worse in any respect.

    Given ``i``, the leaf is on its own, so the comparison is exact; ties keep the first. If one ``j`` per ``i`` is left, ``tie`` folds it.
    """
    off, edges = adjacency(model)
    row_off, rows = row_index(model)
    channels = np.vstack([model.edge_cost[None, :], model.edge_stream])
    nodes = np.vstack([model.cost[None, :], model.node_stream])
    count = _leaf_pairs(
        model.node_off, nodes, model.edge_u, model.edge_v, model.edge_off, channels, off, edges,
        row_off, rows, model.row_off, model.row_bytes,
    )  # fmt: skip
    model.edge_cost = channels[0].copy()
    return int(count)


@numba.njit(cache=True, nogil=True)
def _leaf_pairs(node_off, nodes, eu, ev, edge_off, mat, adj_off, adj_edge, nrow_off, nrow, row_off, row_bytes):  # type: ignore[no-untyped-def]
    count = 0
    for v in range(len(node_off) - 1):
        if adj_off[v + 1] - adj_off[v] != 1:
            continue
        e = adj_edge[adj_off[v]]
        u = eu[e] if ev[e] == v else ev[e]
        if adj_off[u + 1] - adj_off[u] == 1 and u < v:
            continue  # a pair of two leaves: only one of them counts as the leaf
        size = node_off[v + 1] - node_off[v]
        stride, step = (size, 1) if ev[e] == v else (1, node_off[u + 1] - node_off[u])
        for i in range(node_off[u + 1] - node_off[u]):
            base = edge_off[e] + i * stride
            for j in range(size):
                if mat[0, base + j * step] == np.inf:
                    continue
                for t in range(size):
                    if t == j or mat[0, base + t * step] == np.inf:
                        continue
                    better = True
                    for c in range(mat.shape[0]):
                        if nodes[c, node_off[v] + t] + mat[c, base + t * step] > nodes[c, node_off[v] + j] + mat[c, base + j * step]:
                            better = False
                            break
                    k = nrow_off[v]
                    while better and k < nrow_off[v + 1]:
                        better = row_bytes[row_off[nrow[k]] + t] <= row_bytes[row_off[nrow[k]] + j]
                        k += 1
                    if better:
                        mat[0, base + j * step] = np.inf
                        count += 1
                        break
    return count


@numba.njit(cache=True, nogil=True)
def tied_parents(node_off, cost, eu, ev, edge_off, mat):  # type: ignore[no-untyped-def]
    """For each node a parent that decides it (-1: none), acyclic, and the table: each strategy of the parent allows one of the node's.

    A node with many neighbours and few strategies stays beside a parent with many: its edges would grow more than the model shrinks.
    """
    n = len(node_off) - 1
    width = np.zeros(n, np.int64)  # strategies of all neighbours
    for e in range(len(eu)):
        width[eu[e]] += node_off[ev[e] + 1] - node_off[ev[e]]
        width[ev[e]] += node_off[eu[e] + 1] - node_off[eu[e]]
    parent = np.full(n, -1, np.int64)
    via = np.full(n, -1, np.int64)
    for e in range(len(eu)):
        u, v = eu[e], ev[e]
        nu, nv = node_off[u + 1] - node_off[u], node_off[v + 1] - node_off[v]
        for side in range(2):
            up, down, num_up, num_down = (u, v, nu, nv) if side == 0 else (v, u, nv, nu)
            if parent[down] >= 0 or num_down > num_up:
                continue
            if (num_up - num_down) * (width[down] - num_up) > MOST_GROWTH * num_up * num_down:
                continue
            top = up
            while parent[top] >= 0:
                top = parent[top]
            if top == down:
                continue
            tied = True
            for i in range(num_up):
                allowed = 0
                for j in range(num_down):
                    entry = edge_off[e] + (i * nv + j if side == 0 else j * nv + i)
                    if mat[entry] != np.inf:
                        allowed += 1
                        if allowed > 1:
                            break
                if allowed != 1:
                    tied = False
                    break
            if tied:
                parent[down] = up
                via[down] = e
                break
    link_off = np.zeros(n + 1, np.int64)
    for v in range(n):
        link_off[v + 1] = link_off[v] + (node_off[parent[v] + 1] - node_off[parent[v]] if parent[v] >= 0 else 0)
    link = np.zeros(link_off[n], np.int64)
    for v in range(n):
        if parent[v] < 0:
            continue
        e, up = via[v], parent[v]
        stride = node_off[ev[e] + 1] - node_off[ev[e]]
        for i in range(node_off[up + 1] - node_off[up]):
            for j in range(node_off[v + 1] - node_off[v]):
                entry = edge_off[e] + (i * stride + j if ev[e] == v else j * stride + i)
                if mat[entry] != np.inf:
                    link[link_off[v] + i] = j
    return parent, link_off, link
