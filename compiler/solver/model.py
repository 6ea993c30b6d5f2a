"""The solver's working form of a selection problem: simple graph, infinite = forbidden, memory as slots.

A *slot* is one (pool, elementary time interval) with its own limit, so several pools need no special case: the slots of a pool are
consecutive, and a usage row covers a range of them. Streams stay as extra linear terms of nodes and edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from ..problem import FORBIDDEN, SelectionProblem


@dataclass(slots=True, kw_only=True)
class Model:
    """Simple graph (``edge_u < edge_v``, no parallel edges) with slots. ``x`` is feasible if its cost is finite and loads fit."""

    node_off: np.ndarray  # int64[N + 1]
    cost: np.ndarray  # float64[sum strategies], inf = forbidden
    edge_u: np.ndarray  # int64[E]
    edge_v: np.ndarray  # int64[E]
    edge_off: np.ndarray  # int64[E + 1]
    edge_cost: np.ndarray  # float64, row-major [strategies of u, strategies of v], inf = forbidden
    row_node: np.ndarray  # int64[R] usage rows
    row_start: np.ndarray  # int64[R] first slot
    row_end: np.ndarray  # int64[R] one past the last slot
    row_off: np.ndarray  # int64[R + 1]
    row_bytes: np.ndarray  # float64
    slot_limit: np.ndarray  # float64[K] bytes
    slot_pool: np.ndarray  # int64[K]
    slot_time: np.ndarray  # int64[K], for messages
    node_stream: np.ndarray  # float64[S, sum strategies]
    edge_stream: np.ndarray  # float64[S, len(edge_cost)]
    constant: float = 0.0
    stream_constant: np.ndarray  # float64[S]

    @property
    def num_nodes(self) -> int:
        return len(self.node_off) - 1

    @property
    def num_edges(self) -> int:
        return len(self.edge_u)

    @property
    def num_slots(self) -> int:
        return len(self.slot_limit)

    @property
    def num_streams(self) -> int:
        return len(self.stream_constant)

    def sizes(self) -> np.ndarray:
        return np.diff(self.node_off)

    def edge_entries(self, x: np.ndarray) -> np.ndarray:
        """Index into ``edge_cost`` of each edge's chosen pair."""
        return self.edge_off[:-1] + x[self.edge_u] * self.sizes()[self.edge_v] + x[self.edge_v]

    def streams(self, x: np.ndarray) -> np.ndarray:
        """Seconds on each side stream."""
        if self.num_streams == 0:
            return np.zeros(0)
        nodes, edges = self.node_off[:-1] + x, self.edge_entries(x)
        return self.stream_constant + self.node_stream[:, nodes].sum(axis=1) + self.edge_stream[:, edges].sum(axis=1)

    def objective(self, x: np.ndarray) -> float:
        """Cost of ``x`` with the constant; infinite if an entry is forbidden. Memory is not looked at."""
        linear = self.cost[self.node_off[:-1] + x].sum() + self.edge_cost[self.edge_entries(x)].sum()
        return float(self.constant + linear + max(0.0, float(self.streams(x).max(initial=0.0))))

    def loads(self, x: np.ndarray) -> np.ndarray:
        """Bytes in each slot."""
        delta = np.zeros(self.num_slots + 1)
        size = self.row_bytes[self.row_off[:-1] + x[self.row_node]]
        np.add.at(delta, self.row_start, size)
        np.add.at(delta, self.row_end, -size)
        return np.cumsum(delta)[:-1]

    def least_loads(self) -> np.ndarray:
        """A lower bound on the bytes in each slot: every row at its smallest."""
        return slot_sums(self, row_extremes(self.row_off, self.row_bytes)[0])


def slot_sums(model: Model, row_value: np.ndarray) -> np.ndarray:
    """Per slot, the sum of ``row_value`` over the rows that cover it."""
    delta = np.zeros(model.num_slots + 1)
    np.add.at(delta, model.row_start, row_value)
    np.add.at(delta, model.row_end, -row_value)
    return np.cumsum(delta)[:-1]


def row_extremes(row_off: np.ndarray, row_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of each (non-empty) row."""
    if len(row_off) == 1:
        return np.zeros(0), np.zeros(0)
    return np.minimum.reduceat(row_bytes, row_off[:-1]), np.maximum.reduceat(row_bytes, row_off[:-1])


def from_problem(problem: SelectionProblem) -> Model:
    """The working form of ``problem``; every node must have a strategy."""
    node_off = problem.node_offsets()
    cost = np.where(problem.node_cost >= FORBIDDEN, np.inf, problem.node_cost)
    node_stream = np.array(problem.node_stream, dtype=np.float64).reshape(len(problem.streams), cost.size)
    edge_stream = np.array(problem.edge_stream, dtype=np.float64).reshape(len(problem.streams), problem.edge_cost.size)
    eu, ev = problem.edges[:, 0].astype(np.int64), problem.edges[:, 1].astype(np.int64)
    raw = np.where(problem.edge_cost >= FORBIDDEN, np.inf, problem.edge_cost)
    channels = np.vstack([raw[None, :], edge_stream])
    node_channels = np.vstack([cost[None, :], node_stream])
    eu, ev, edge_off, channels = merge_edges(node_off, eu, ev, problem.edge_offsets(), channels, node_channels)
    rows = _slot_rows(problem)
    return Model(
        node_off=node_off,
        cost=node_channels[0].copy(),
        edge_u=eu,
        edge_v=ev,
        edge_off=edge_off,
        edge_cost=channels[0].copy(),
        node_stream=node_channels[1:].copy(),
        edge_stream=channels[1:].copy(),
        stream_constant=np.zeros(len(problem.streams)),
        **rows,
    )


def _slot_rows(problem: SelectionProblem) -> dict[str, Any]:
    """Usage rows of limited pools over slots: the elementary intervals between the start and end times of each pool."""
    offsets = problem.usage_offsets()
    start, end = np.zeros(len(problem.usage_node), dtype=np.int64), np.zeros(len(problem.usage_node), dtype=np.int64)
    limits, pools, times = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    keep, base = np.zeros(len(start), dtype=bool), 0
    for p in range(len(problem.pools)):
        live = (problem.usage_pool == p) & (problem.usage_end > problem.usage_start) & np.isfinite(problem.limits[p])
        if not live.any():
            continue
        at = np.unique(np.concatenate([problem.usage_start[live], problem.usage_end[live]]))
        start[live] = base + np.searchsorted(at, problem.usage_start[live])
        end[live] = base + np.searchsorted(at, problem.usage_end[live])
        keep |= live
        limits.append(np.full(len(at) - 1, problem.limits[p] + problem.tolerance()[p]))
        pools.append(np.full(len(at) - 1, p, dtype=np.int64))
        times.append(at[:-1].astype(np.int64))
        base += len(at) - 1
    length = np.diff(offsets)
    row_off = np.zeros(int(keep.sum()) + 1, dtype=np.int64)
    np.cumsum(length[keep], out=row_off[1:])
    return {
        "row_node": problem.usage_node[keep].astype(np.int64),
        "row_start": start[keep],
        "row_end": end[keep],
        "row_off": row_off,
        "row_bytes": problem.usage_bytes[np.repeat(keep, length)].astype(np.float64),
        "slot_limit": np.concatenate(limits),
        "slot_pool": np.concatenate(pools),
        "slot_time": np.concatenate(times),
    }


def merge_edges(
    node_off: np.ndarray, eu: np.ndarray, ev: np.ndarray, edge_off: np.ndarray, channels: np.ndarray, node_channels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One edge per unordered pair, ``u < v``; the diagonal of self edges is added to ``node_channels`` in place."""
    if len(eu) == 0:
        return eu, ev, np.zeros(1, dtype=np.int64), channels[:, :0]
    low, high = np.minimum(eu, ev), np.maximum(eu, ev)
    order = np.lexsort((high, low))
    order = order[low[order] != high[order]]
    for e in np.flatnonzero(eu == ev):
        n, size = eu[e], node_off[eu[e] + 1] - node_off[eu[e]]
        node_channels[:, node_off[n] : node_off[n + 1]] += channels[:, edge_off[e] + np.arange(size) * (size + 1)]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (low[order][1:] != low[order][:-1]) | (high[order][1:] != high[order][:-1])
    new_u, new_v = low[order][first], high[order][first]
    sizes = np.diff(node_off)
    new_off = np.zeros(len(new_u) + 1, dtype=np.int64)
    np.cumsum(sizes[new_u] * sizes[new_v], out=new_off[1:])
    out = np.zeros((len(channels), int(new_off[-1])))
    _sum_matrices(order, np.cumsum(first) - 1, eu, ev, sizes, edge_off, channels, new_off, out)
    return new_u, new_v, new_off, out


@numba.njit(cache=True, nogil=True)
def _sum_matrices(order, target, eu, ev, sizes, edge_off, channels, new_off, out):  # type: ignore[no-untyped-def]
    for k in range(len(order)):
        e, at = order[k], new_off[target[k]]
        nu, nv = sizes[eu[e]], sizes[ev[e]]
        base = edge_off[e]
        for c in range(channels.shape[0]):
            if eu[e] < ev[e]:
                for i in range(nu * nv):
                    out[c, at + i] += channels[c, base + i]
            else:
                for i in range(nu):
                    for j in range(nv):
                        out[c, at + j * nu + i] += channels[c, base + i * nv + j]
