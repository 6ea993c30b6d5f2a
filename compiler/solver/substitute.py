"""Substitution: the one transformation behind most reductions.

Every node of a model becomes a function of a node of a smaller model, ``x[n] = table[n][x'[root[n]]]``, or a constant
(``root[n] = -1``, the table has one entry). Dropping strategies (``root`` is the node itself, the table lists those that stay),
merging tied nodes, folding of leaves and of decided nodes are all of this form, so they share one kernel for costs, edges and memory
and one way back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numba
import numpy as np

from .model import Model, merge_edges


@dataclass(slots=True, kw_only=True)
class Substitution:
    """``x[n] = table[table_off[n] + x'[root[n]]]``; ``root`` -1 means the constant ``table[table_off[n]]``."""

    root: np.ndarray  # int64[N]
    table_off: np.ndarray  # int64[N + 1]
    table: np.ndarray  # int64

    def undo(self, x: np.ndarray) -> np.ndarray:
        """The selection of the larger model."""
        inside = np.where(self.root >= 0, x[np.maximum(self.root, 0)] if len(x) else 0, 0)
        return self.table[self.table_off[:-1] + inside]


def keep_strategies(node_off: np.ndarray, keep: np.ndarray) -> Substitution:
    """Keep the strategies marked in ``keep``; nodes left with one become constants. Every node must keep one."""
    sizes = np.add.reduceat(keep.astype(np.int64), node_off[:-1]) if len(node_off) > 1 else np.zeros(0, dtype=np.int64)
    table_off = np.zeros(len(node_off), dtype=np.int64)
    np.cumsum(sizes, out=table_off[1:])
    kept = np.flatnonzero(keep)
    table = kept - np.repeat(node_off[:-1], sizes)
    free = sizes > 1
    return Substitution(root=np.where(free, np.cumsum(free) - 1, -1), table_off=table_off, table=table)


def bind(model: Model, parent: np.ndarray, link_off: np.ndarray, link: np.ndarray) -> Substitution:
    """``x[v] = link[link_off[v] + x[parent[v]]]`` where ``parent[v] >= 0``; chains are allowed, cycles are not."""
    top, table_off, table = _compose(model.sizes(), parent, link_off, link)
    own = parent < 0
    number = np.cumsum(own) - 1
    return Substitution(root=number[top], table_off=table_off, table=table)


@numba.njit(cache=True, nogil=True)
def _compose(sizes, parent, link_off, link):  # type: ignore[no-untyped-def]
    n = len(sizes)
    top = np.arange(n)
    table_off = np.zeros(n + 1, np.int64)
    for v in range(n):
        while parent[top[v]] >= 0:
            top[v] = parent[top[v]]
        table_off[v + 1] = table_off[v] + sizes[top[v]]
    table = np.empty(table_off[n], np.int64)
    path = np.empty(n + 1, np.int64)
    for v in range(n):
        depth, at = 0, v
        while parent[at] >= 0:
            path[depth] = at
            depth += 1
            at = parent[at]
        for s in range(sizes[at]):
            value = s
            for d in range(depth - 1, -1, -1):
                value = link[link_off[path[d]] + value]
            table[table_off[v] + s] = value
    return top, table_off, table


def substitute(model: Model, sub: Substitution) -> Model:
    """The smaller model under ``sub``; its costs and loads agree with those of ``model`` for every selection of the smaller one."""
    num = int(sub.root.max(initial=-1)) + 1
    sizes = np.zeros(num, dtype=np.int64)
    free = sub.root >= 0
    sizes[sub.root[free]] = np.diff(sub.table_off)[free]
    node_off = np.zeros(num + 1, dtype=np.int64)
    np.cumsum(sizes, out=node_off[1:])
    channels = np.zeros((1 + model.num_streams, int(node_off[-1])))
    old_nodes = np.vstack([model.cost[None, :], model.node_stream])
    constant = np.zeros(1 + model.num_streams)
    _map_nodes(model.node_off, old_nodes, sub.root, sub.table_off, sub.table, node_off, channels, constant)
    edges, edge_channels = _map_all_edges(model, sub, node_off, channels, constant)
    rows = _map_all_rows(model, sub, node_off)
    return Model(
        node_off=node_off,
        cost=channels[0].copy(),
        edge_u=edges[0],
        edge_v=edges[1],
        edge_off=edges[2],
        edge_cost=edge_channels[0].copy(),
        node_stream=channels[1:].copy(),
        edge_stream=edge_channels[1:].copy(),
        constant=model.constant + constant[0],
        stream_constant=model.stream_constant + constant[1:],
        slot_pool=model.slot_pool,
        slot_time=model.slot_time,
        **rows,
    )


def _map_all_edges(
    model: Model, sub: Substitution, node_off: np.ndarray, channels: np.ndarray, constant: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Edges between different roots, merged; the rest goes to ``channels`` (node costs) and ``constant`` in place."""
    ru, rv = sub.root[model.edge_u], sub.root[model.edge_v]
    old = np.vstack([model.edge_cost[None, :], model.edge_stream])
    between = (ru >= 0) & (rv >= 0) & (ru != rv)
    sizes = np.diff(node_off)
    lengths = np.where(between, sizes[ru] * sizes[rv], 0) if len(sizes) else np.zeros(len(ru), dtype=np.int64)
    new_off = np.zeros(len(ru) + 1, dtype=np.int64)
    np.cumsum(lengths, out=new_off[1:])
    out = np.empty((len(old), int(new_off[-1])))
    args = (model.edge_u, model.edge_v, model.edge_off, np.diff(model.node_off), old)
    _map_edges(*args, sub.root, sub.table_off, sub.table, node_off, new_off, out, channels, constant)
    kept = np.flatnonzero(between)
    kept_off = np.append(new_off[:-1][between], new_off[-1])
    u, v, off, merged = merge_edges(node_off, ru[kept], rv[kept], kept_off, out, channels)
    return (u, v, off), merged


@numba.njit(cache=True, nogil=True)
def _map_nodes(old_off, old, root, table_off, table, node_off, channels, constant):  # type: ignore[no-untyped-def]
    for n in range(len(root)):
        for c in range(old.shape[0]):
            if root[n] < 0:
                constant[c] += old[c, old_off[n] + table[table_off[n]]]
                continue
            at = node_off[root[n]]
            for s in range(node_off[root[n] + 1] - at):
                channels[c, at + s] += old[c, old_off[n] + table[table_off[n] + s]]


@numba.njit(cache=True, nogil=True)
def _map_edges(eu, ev, edge_off, sizes, old, root, table_off, table, node_off, new_off, out, channels, constant):  # type: ignore[no-untyped-def]
    for e in range(len(eu)):
        u, v = eu[e], ev[e]
        ru, rv, width, base = root[u], root[v], sizes[v], edge_off[e]
        tu, tv = table_off[u], table_off[v]
        for c in range(old.shape[0]):
            if ru < 0 and rv < 0:
                constant[c] += old[c, base + table[tu] * width + table[tv]]
            elif ru < 0:
                for s in range(node_off[rv + 1] - node_off[rv]):
                    channels[c, node_off[rv] + s] += old[c, base + table[tu] * width + table[tv + s]]
            elif rv < 0:
                for s in range(node_off[ru + 1] - node_off[ru]):
                    channels[c, node_off[ru] + s] += old[c, base + table[tu + s] * width + table[tv]]
            elif ru == rv:
                for s in range(node_off[ru + 1] - node_off[ru]):
                    channels[c, node_off[ru] + s] += old[c, base + table[tu + s] * width + table[tv + s]]
            else:
                at, nv = new_off[e], node_off[rv + 1] - node_off[rv]
                for s in range(node_off[ru + 1] - node_off[ru]):
                    line = base + table[tu + s] * width
                    for t in range(nv):
                        out[c, at + s * nv + t] = old[c, line + table[tv + t]]


def _map_all_rows(model: Model, sub: Substitution, node_off: np.ndarray) -> dict[str, np.ndarray]:
    """Rows on the roots, equal ranges of one root merged, each row's minimum moved into the limits, rows of zeros dropped."""
    root = sub.root[model.row_node] if len(model.row_node) else model.row_node
    order = np.lexsort((model.row_end, model.row_start, root))
    order = order[root[order] >= 0]
    r, a, b = root[order], model.row_start[order], model.row_end[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (r[1:] != r[:-1]) | (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    node, start, end = r[first], a[first], b[first]
    sizes = np.diff(node_off)
    row_off = np.zeros(len(node) + 1, dtype=np.int64)
    np.cumsum(sizes[node] if len(node) else np.zeros(0, dtype=np.int64), out=row_off[1:])
    out = np.zeros(int(row_off[-1]))
    _map_rows(order, np.cumsum(first) - 1, model.row_node, model.row_off, model.row_bytes, sub.table_off, sub.table, row_off, out)
    low = np.minimum.reduceat(out, row_off[:-1]) if len(node) else np.zeros(0)
    high = np.maximum.reduceat(out, row_off[:-1]) if len(node) else np.zeros(0)
    fixed = root < 0
    settled = model.row_bytes[model.row_off[:-1][fixed] + sub.table[sub.table_off[model.row_node[fixed]]]]
    delta = np.zeros(model.num_slots + 1)
    for at, value in ((model.row_start[fixed], settled), (start, low)):
        np.add.at(delta, at, value)
    for at, value in ((model.row_end[fixed], settled), (end, low)):
        np.add.at(delta, at, -value)
    keep = high > low
    new_off = np.zeros(int(keep.sum()) + 1, dtype=np.int64)
    np.cumsum(np.diff(row_off)[keep], out=new_off[1:])
    return {
        "row_node": node[keep],
        "row_start": start[keep],
        "row_end": end[keep],
        "row_off": new_off,
        "row_bytes": (out - np.repeat(low, np.diff(row_off)))[np.repeat(keep, np.diff(row_off))],
        "slot_limit": model.slot_limit - np.cumsum(delta)[:-1],
    }


@numba.njit(cache=True, nogil=True)
def _map_rows(order, target, row_node, old_off, old, table_off, table, row_off, out):  # type: ignore[no-untyped-def]
    for k in range(len(order)):
        r, at = order[k], row_off[target[k]]
        tab = table_off[row_node[r]]
        for s in range(row_off[target[k] + 1] - at):
            out[at + s] += old[old_off[r] + table[tab + s]]


def drop_slots(model: Model) -> Model:
    """Only the slots that can bind: not those that fit at their largest, nor those that a neighbouring slot implies."""
    if model.num_slots == 0:
        return model
    used = model.row_bytes
    high = np.maximum.reduceat(used, model.row_off[:-1]) if len(model.row_node) else np.zeros(0)
    delta = np.zeros(model.num_slots + 1)
    np.add.at(delta, model.row_start, high)
    np.add.at(delta, model.row_end, -high)
    binds = np.cumsum(delta)[:-1] > model.slot_limit
    begins, ends = np.zeros(model.num_slots + 1, dtype=bool), np.zeros(model.num_slots + 1, dtype=bool)
    keep = binds
    while True:
        place = np.concatenate([[0], np.cumsum(keep)])
        start, end = place[model.row_start], place[model.row_end]
        some = start < end
        begins[:], ends[:] = False, False
        begins[start[some]] = True
        ends[end[some]] = True
        alive = np.flatnonzero(keep)
        stays = _undominated(begins, ends, model.slot_limit[alive], model.slot_pool[alive])
        if stays.all():
            break
        keep = keep.copy()
        keep[alive[~stays]] = False
    return _with_slots(model, keep)


@numba.njit(cache=True, nogil=True)
def _undominated(begins, ends, limit, pool):  # type: ignore[no-untyped-def]
    """Slot k + 1 is implied by k if no row begins there and its limit is no smaller; likewise the other way round."""
    n = len(limit)
    stays = np.ones(n, np.bool_)
    last = 0
    for k in range(1, n):
        # rows that begin or end between the last slot that stays and k: only neighbours are compared
        if last == k - 1 and pool[k] == pool[k - 1]:
            if not begins[k] and limit[k] >= limit[k - 1]:
                stays[k] = False
                continue
            if not ends[k] and limit[k - 1] >= limit[k]:
                stays[k - 1] = False
        last = k
    return stays


def _with_slots(model: Model, keep: np.ndarray) -> Model:
    place = np.concatenate([[0], np.cumsum(keep)])
    start, end = place[model.row_start], place[model.row_end]
    some = start < end
    length = np.diff(model.row_off)
    row_off = np.zeros(int(some.sum()) + 1, dtype=np.int64)
    np.cumsum(length[some], out=row_off[1:])
    return Model(
        node_off=model.node_off,
        cost=model.cost,
        edge_u=model.edge_u,
        edge_v=model.edge_v,
        edge_off=model.edge_off,
        edge_cost=model.edge_cost,
        node_stream=model.node_stream,
        edge_stream=model.edge_stream,
        constant=model.constant,
        stream_constant=model.stream_constant,
        row_node=model.row_node[some],
        row_start=start[some],
        row_end=end[some],
        row_off=row_off,
        row_bytes=model.row_bytes[np.repeat(some, length)],
        slot_limit=model.slot_limit[keep],
        slot_pool=model.slot_pool[keep],
        slot_time=model.slot_time[keep],
    )


def without_slots(model: Model) -> Model:
    """The model without its memory."""
    nothing = np.zeros(0, dtype=np.int64)
    return replace(
        model,
        row_node=nothing,
        row_start=nothing,
        row_end=nothing,
        row_off=np.zeros(1, dtype=np.int64),
        row_bytes=np.zeros(0),
        slot_limit=np.zeros(0),
        slot_pool=nothing,
        slot_time=nothing,
    )
