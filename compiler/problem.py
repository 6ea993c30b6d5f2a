"""The selection problem: pick one strategy per node, numbers only.

Variables
    ``x[n]`` in ``0 .. num_strategies[n] - 1``: the chosen strategy of node ``n``.
Objective (seconds, or the contest's cost unit), minimised
    ``sum_n node_cost[n, x[n]] + sum_e edge_cost[e, x[u_e], x[v_e]] + max(0, max_s load_s(x))`` with
    ``load_s(x) = sum_n node_stream[s, n, x[n]] + sum_e edge_stream[s, e, x[u_e], x[v_e]]``:
    what is on the critical path adds up, what runs beside it costs only where its stream is the bottleneck.
Constraints
    memory: for each pool ``p`` and time ``t``, the bytes of the chosen strategies of the usage rows of ``p`` that are live at ``t``
    (``start <= t < end``) add up to at most ``limits[p]``;
    forbidden: a node or edge entry of ``FORBIDDEN`` or more is never chosen.

With one pool, no stream and one usage row per node this is the problem of the ASPLOS 2025 / EuroSys 2025 contest on intra-operator
parallelism (`problem_io` reads and writes its JSON). All arrays are flat: the strategies of node ``n`` are
``node_offsets[n]:node_offsets[n + 1]``, the matrix of edge ``e`` is row-major (last node fastest) from ``edge_offsets[e]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FORBIDDEN = 1e18
"""Costs at and above this mean "never" (the contest's convention); infinity means the same."""

_MAX_EXACT = 2.0**63


def _no_floats() -> np.ndarray:
    return np.zeros(0)


def _no_indices() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


def _no_pairs() -> np.ndarray:
    return np.zeros((0, 2), dtype=np.int32)


def _no_streams() -> np.ndarray:
    return np.zeros((0, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one selection costs. ``objective`` is infinite if a forbidden entry is chosen; memory does not change it."""

    objective: float
    node_cost: float
    edge_cost: float
    stream_s: np.ndarray  # float64[S]
    peak_bytes: np.ndarray  # float64[P]
    peak_time: np.ndarray  # int64[P], the first time the peak is reached
    feasible: bool
    reason: str  # empty if feasible


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionProblem:
    """Nodes, edges, pools and streams in flat arrays (see the module docstring); ``verify`` checks all of it."""

    name: str = "problem"
    num_strategies: np.ndarray  # int32[N]
    node_cost: np.ndarray  # float64[sum num_strategies]
    edges: np.ndarray = field(default_factory=_no_pairs)  # int32[E, 2]; parallel edges and self edges (diagonal) are allowed
    edge_cost: np.ndarray = field(default_factory=_no_floats)  # float64[sum over edges of n_u * n_v]
    pools: tuple[str, ...] = ()
    limits: np.ndarray = field(default_factory=_no_floats)  # float64[P] bytes, inf = unlimited
    usage_node: np.ndarray = field(default_factory=_no_indices)  # int[U]
    usage_pool: np.ndarray = field(default_factory=_no_indices)  # int[U]
    usage_start: np.ndarray = field(default_factory=_no_indices)  # int[U], live over [start, end)
    usage_end: np.ndarray = field(default_factory=_no_indices)  # int[U]
    usage_bytes: np.ndarray = field(default_factory=_no_floats)  # [sum over rows of num_strategies[usage_node]]
    streams: tuple[str, ...] = ()
    node_stream: np.ndarray = field(default_factory=_no_streams)  # float64[S, len(node_cost)], negative = time that hides the stream
    edge_stream: np.ndarray = field(default_factory=_no_streams)  # float64[S, len(edge_cost)]

    @property
    def num_nodes(self) -> int:
        return len(self.num_strategies)

    @property
    def num_edges(self) -> int:
        return len(self.edges)

    def node_offsets(self) -> np.ndarray:
        """int64[N + 1]: where the strategies of each node begin in ``node_cost``."""
        return _offsets(self.num_strategies)

    def edge_offsets(self) -> np.ndarray:
        """int64[E + 1]: where the matrix of each edge begins in ``edge_cost``."""
        sizes = self.num_strategies.astype(np.int64)
        return _offsets(sizes[self.edges[:, 0]] * sizes[self.edges[:, 1]])

    def usage_offsets(self) -> np.ndarray:
        """int64[U + 1]: where the bytes of each usage row begin in ``usage_bytes``."""
        return _offsets(self.num_strategies[self.usage_node])

    def verify(self) -> None:
        """Raise ``ValueError`` naming the first thing that is not a well-formed problem."""
        _verify_nodes(self)
        _verify_edges(self)
        _verify_usage(self)
        _verify_streams(self)

    def evaluate(self, selection: np.ndarray | Sequence[int]) -> Evaluation:
        """Score ``selection`` (one strategy index per node) from the definition."""
        x = np.asarray(selection, dtype=np.int64)
        if x.shape != (self.num_nodes,):
            raise ValueError(f"selection has shape {x.shape}, expected ({self.num_nodes},): one strategy index per node")
        if self.num_nodes and ((x < 0) | (x >= self.num_strategies)).any():
            n = int(np.flatnonzero((x < 0) | (x >= self.num_strategies))[0])
            raise ValueError(f"selection of node {n} is {x[n]}, it has strategies 0 to {self.num_strategies[n] - 1}")
        node_entry = self.node_offsets()[:-1] + x
        u, v = self.edges[:, 0], self.edges[:, 1]
        edge_entry = self.edge_offsets()[:-1] + x[u] * self.num_strategies[v].astype(np.int64) + x[v]
        node_cost, edge_cost = self.node_cost[node_entry], self.edge_cost[edge_entry]
        stream_s = np.zeros(0)
        if self.streams:
            stream_s = self.node_stream[:, node_entry].sum(axis=1) + self.edge_stream[:, edge_entry].sum(axis=1)
        usage = self.usage_bytes[self.usage_offsets()[:-1] + x[self.usage_node]]
        peak, when = self._peaks(usage)
        reason = self._violation(node_cost, edge_cost, peak, when)
        forbidden = (node_cost >= FORBIDDEN).any() or (edge_cost >= FORBIDDEN).any()
        total = float(node_cost.sum() + edge_cost.sum() + max(0.0, float(stream_s.max(initial=0.0))))
        return Evaluation(
            objective=math.inf if forbidden else total,
            node_cost=float(node_cost.sum()),
            edge_cost=float(edge_cost.sum()),
            stream_s=stream_s,
            peak_bytes=peak,
            peak_time=when,
            feasible=not reason,
            reason=reason,
        )

    def tolerance(self) -> np.ndarray:
        """Bytes per pool by which a sum may pass its limit: zero for whole bytes, rounding error for fractional ones."""
        whole = bool(np.all(np.floor(self.usage_bytes) == self.usage_bytes))
        return np.where(np.isfinite(self.limits), 0.0 if whole else 1e-9, 0.0) * np.where(np.isfinite(self.limits), self.limits, 0.0)

    def _peaks(self, usage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Highest load of each pool and the first time it is reached; ``usage`` is bytes per row."""
        peak, when = np.zeros(len(self.pools)), np.zeros(len(self.pools), dtype=np.int64)
        for p in range(len(self.pools)):
            live = (self.usage_pool == p) & (self.usage_end > self.usage_start)
            if not live.any():
                continue
            start, end, size = self.usage_start[live], self.usage_end[live], usage[live]
            times, where = np.unique(np.concatenate([start, end]), return_inverse=True)
            load = np.cumsum(np.bincount(where.ravel(), weights=np.concatenate([size, -size]), minlength=len(times)))
            peak[p], when[p] = load.max(), times[load.argmax()]
        return peak, when

    def _violation(self, node_cost: np.ndarray, edge_cost: np.ndarray, peak: np.ndarray, when: np.ndarray) -> str:
        if (node_cost >= FORBIDDEN).any():
            return f"node {int(np.flatnonzero(node_cost >= FORBIDDEN)[0])} uses a forbidden strategy"
        if (edge_cost >= FORBIDDEN).any():
            e = int(np.flatnonzero(edge_cost >= FORBIDDEN)[0])
            return f"edge {e} ({self.edges[e, 0]}, {self.edges[e, 1]}) uses a forbidden pair"
        over = np.flatnonzero(peak > self.limits + self.tolerance())
        if len(over) == 0:
            return ""
        p = int(over[0])
        return f"pool {self.pools[p]!r} holds {peak[p]:.0f} bytes at time {when[p]}, its limit is {self.limits[p]:.0f}"


class ProblemBuilder:
    """Collects nodes, edges and usage rows one by one; ``build`` concatenates once.

    >>> b = ProblemBuilder(pools={"device": 100.0}, streams=("host_to_device",))
    >>> n = b.add_node([1.0, 2.0], streams={"host_to_device": [0.5, 0.0]})
    >>> b.add_usage(n, "device", 0, 10, [60, 120])
    >>> problem = b.build()
    """

    def __init__(self, name: str = "problem", *, pools: Mapping[str, float] | None = None, streams: Sequence[str] = ()) -> None:
        self.name = name
        self.pools = dict(pools or {})
        self.streams = tuple(streams)
        self._pool_index = {pool: i for i, pool in enumerate(self.pools)}
        self._node_cost: list[np.ndarray] = []
        self._node_stream: list[np.ndarray | None] = []
        self._edges: list[tuple[int, int]] = []
        self._edge_cost: list[np.ndarray] = []
        self._edge_stream: list[np.ndarray | None] = []
        self._usage: list[tuple[int, int, int, int]] = []
        self._usage_bytes: list[np.ndarray] = []

    @property
    def num_nodes(self) -> int:
        return len(self._node_cost)

    def add_node(self, costs: Any, streams: Any = None) -> int:
        """A node with one strategy per cost (seconds); ``streams``: {stream name: seconds per strategy} or an array [S, strategies]."""
        vector = np.asarray(costs, dtype=np.float64).ravel()
        self._node_cost.append(vector)
        self._node_stream.append(self._stream_rows(streams, vector.size))
        return len(self._node_cost) - 1

    def add_edge(self, u: int, v: int, matrix: Any, streams: Any = None) -> int:
        """A cost matrix [strategies of u, strategies of v]; ``streams`` as in ``add_node`` with matrices instead of vectors."""
        cost = np.asarray(matrix, dtype=np.float64)
        shape = (self._node_cost[u].size, self._node_cost[v].size)
        if cost.size != shape[0] * shape[1] or (cost.ndim == 2 and cost.shape != shape):
            raise ValueError(f"edge ({u}, {v}): cost matrix has shape {cost.shape}, expected {shape}")
        self._edges.append((u, v))
        self._edge_cost.append(cost.ravel())
        self._edge_stream.append(self._stream_rows(streams, cost.size))
        return len(self._edges) - 1

    def add_usage(self, node: int, pool: str | int, start: int, end: int, bytes_vector: Any) -> None:
        """Bytes of ``pool`` that each strategy of ``node`` holds over [start, end)."""
        if isinstance(pool, str):
            if pool not in self._pool_index:
                raise ValueError(f"unknown pool {pool!r}; the pools of this problem are {sorted(self.pools)}")
            pool = self._pool_index[pool]
        size = np.asarray(bytes_vector, dtype=np.float64).ravel()
        if size.size != self._node_cost[node].size:
            raise ValueError(f"node {node} has {self._node_cost[node].size} strategies, its usage row has {size.size} values")
        self._usage.append((node, pool, start, end))
        self._usage_bytes.append(size)

    def build(self, *, verify: bool = True) -> SelectionProblem:
        """The finished problem; ``verify=False`` skips the checks (for callers that build many)."""
        sizes = np.array([c.size for c in self._node_cost], dtype=np.int32)
        usage = np.array(self._usage, dtype=np.int64).reshape(-1, 4)
        problem = SelectionProblem(
            name=self.name,
            num_strategies=sizes,
            node_cost=concatenate(self._node_cost),
            edges=np.array(self._edges, dtype=np.int32).reshape(-1, 2),
            edge_cost=concatenate(self._edge_cost),
            pools=tuple(self.pools),
            limits=np.array(list(self.pools.values()), dtype=np.float64),
            usage_node=usage[:, 0].copy(),
            usage_pool=usage[:, 1].copy(),
            usage_start=usage[:, 2].copy(),
            usage_end=usage[:, 3].copy(),
            usage_bytes=concatenate(self._usage_bytes),
            streams=self.streams,
            node_stream=self._stream_matrix(self._node_stream, self._node_cost),
            edge_stream=self._stream_matrix(self._edge_stream, self._edge_cost),
        )
        if verify:
            problem.verify()
        return problem

    def _stream_rows(self, streams: Any, width: int) -> np.ndarray | None:
        if streams is None or not self.streams:
            return None
        if not isinstance(streams, Mapping):
            return np.asarray(streams, dtype=np.float64).reshape(len(self.streams), width)
        unknown = set(streams) - set(self.streams)
        if unknown:
            raise ValueError(f"unknown stream {sorted(unknown)[0]!r}; the streams of this problem are {sorted(self.streams)}")
        rows = np.zeros((len(self.streams), width))
        for i, name in enumerate(self.streams):
            if name in streams:
                rows[i] = np.asarray(streams[name], dtype=np.float64).ravel()
        return rows

    def _stream_matrix(self, parts: list[np.ndarray | None], like: list[np.ndarray]) -> np.ndarray:
        out = np.zeros((len(self.streams), sum(c.size for c in like)))
        at = 0
        for part, costs in zip(parts, like, strict=True):
            if part is not None:
                out[:, at : at + costs.size] = part
            at += costs.size
        return out


def _offsets(sizes: np.ndarray) -> np.ndarray:
    out = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=out[1:])
    return out


def concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """As numpy's, also of no parts."""
    return np.concatenate(parts) if parts else np.zeros(0)


def check(condition: Any, message: str) -> None:
    """Raises ValueError with the message where a condition of a problem does not hold."""
    if not condition:
        raise ValueError(message)


def _verify_nodes(p: SelectionProblem) -> None:
    check(p.num_strategies.ndim == 1, f"num_strategies must be one-dimensional, it has shape {p.num_strategies.shape}")
    check((p.num_strategies >= 0).all(), "num_strategies has negative entries")
    total = int(p.num_strategies.sum(dtype=np.int64))
    check(p.node_cost.shape == (total,), f"node_cost has shape {p.node_cost.shape}, num_strategies adds up to {total}")
    _verify_costs(p.node_cost, p.node_offsets(), "node")


def _verify_edges(p: SelectionProblem) -> None:
    check(p.edges.ndim == 2 and p.edges.shape[1] == 2, f"edges has shape {p.edges.shape}, expected (E, 2)")
    bad = ((p.edges < 0) | (p.edges >= p.num_nodes)).any(axis=1)
    if bad.any():
        e = int(np.flatnonzero(bad)[0])
        raise ValueError(f"edge {e} joins nodes {p.edges[e].tolist()}, valid node indices are 0 to {p.num_nodes - 1}")
    offsets = p.edge_offsets()
    expected = int(offsets[-1])
    check(p.edge_cost.shape == (expected,), f"edge_cost has shape {p.edge_cost.shape}, the edge matrices need {expected} entries")
    _verify_costs(p.edge_cost, offsets, "edge")


def _verify_costs(costs: np.ndarray, offsets: np.ndarray, what: str) -> None:
    bad = np.isnan(costs) | (costs <= -FORBIDDEN)
    if bad.any():
        entry = int(np.flatnonzero(bad)[0])
        owner = int(np.searchsorted(offsets, entry, side="right")) - 1
        where = f"{what} {owner} has cost {costs[entry]} at entry {entry - int(offsets[owner])}"
        raise ValueError(f"{where}; costs must be numbers above -{FORBIDDEN:g}")


def _verify_usage(p: SelectionProblem) -> None:
    num = len(p.usage_node)
    check(p.limits.shape == (len(p.pools),), f"limits has shape {p.limits.shape}, there are {len(p.pools)} pools")
    for name, limit in zip(p.pools, p.limits.tolist(), strict=True):
        check(not math.isnan(limit) and limit >= 0, f"pool {name!r} has limit {limit}; a limit is a number of bytes >= 0, or infinity")
        fits = math.isinf(limit) or limit < _MAX_EXACT
        check(fits, f"pool {name!r} has limit {limit:g}, which overflows 64-bit bytes; use infinity for no limit")
    for label, array in (("usage_pool", p.usage_pool), ("usage_start", p.usage_start), ("usage_end", p.usage_end)):
        check(array.shape == (num,), f"{label} has shape {array.shape}, usage_node has {num} rows")
    for label, array, size in (("node", p.usage_node, p.num_nodes), ("pool", p.usage_pool, len(p.pools))):
        bad = (array < 0) | (array >= size)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ValueError(f"usage row {row} names {label} {array[row]}, valid {label} indices are 0 to {size - 1}")
    offsets = p.usage_offsets()
    expected = int(offsets[-1])
    check(p.usage_bytes.shape == (expected,), f"usage_bytes has shape {p.usage_bytes.shape}, the rows need {expected} values")
    bad = ~np.isfinite(p.usage_bytes) | (p.usage_bytes < 0)
    if bad.any():
        entry = int(np.flatnonzero(bad)[0])
        row = int(np.searchsorted(offsets, entry, side="right")) - 1
        raise ValueError(f"usage row {row} (node {p.usage_node[row]}) has {p.usage_bytes[entry]} bytes; bytes must be finite and >= 0")
    check(float(p.usage_bytes.sum(dtype=np.float64)) < 1e30, "usage_bytes overflow: they add up to more than 1e30 bytes")


def _verify_streams(p: SelectionProblem) -> None:
    num = len(p.streams)
    for label, array, width in (("node_stream", p.node_stream, p.node_cost.size), ("edge_stream", p.edge_stream, p.edge_cost.size)):
        if num or array.size:
            check(array.shape == (num, width), f"{label} has shape {array.shape}, expected ({num}, {width})")
        check(np.isfinite(array).all(), f"{label} must be finite; forbid a choice in node_cost or edge_cost instead")
