"""Half-edge form of a model for message passing and local search: both orientations of every matrix, contiguous.

Node ``n`` has strategies ``node_off[n]:node_off[n + 1]`` and half-edges ``half_off[n]:half_off[n + 1]``. Half-edge ``h`` leads to
``neighbor[h]`` with the matrix ``matrix[at[h]:]`` of shape [strategies of n, strategies of neighbor]; ``back[h]`` is the same edge from
the other side. Forbidden entries are ``big``, a finite cost no optimal selection can reach, so that sums stay finite.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numba
import numpy as np

from .model import Model
from .reduce import row_index


class Graph(NamedTuple):
    """A named tuple, so that compiled kernels take it as one argument."""

    node_off: np.ndarray  # int64[N + 1]
    cost: np.ndarray  # float64, without prices
    half_off: np.ndarray  # int64[N + 1]
    neighbor: np.ndarray  # int64[2 E]
    at: np.ndarray  # int64[2 E]
    back: np.ndarray  # int64[2 E]
    matrix: np.ndarray  # float64
    big: float


class Rows(NamedTuple):
    """Usage rows over slots, and the rows of each node."""

    node: np.ndarray  # int64[R]
    start: np.ndarray  # int64[R]
    end: np.ndarray  # int64[R]
    off: np.ndarray  # int64[R + 1]
    bytes: np.ndarray  # float64
    limit: np.ndarray  # float64[K]
    scale: np.ndarray  # float64[K]: the largest limit of the slot's pool, the unit of relative overload
    node_off: np.ndarray  # int64[N + 1]
    of_node: np.ndarray  # int64[R]: rows sorted by node


class Flows(NamedTuple):
    """Seconds on the side streams; ``edge`` is laid out as ``Graph.matrix``. The graph's costs hold ``weight`` times them already."""

    node: np.ndarray  # float64[S, sum strategies]
    edge: np.ndarray  # float64[S, len(matrix)]
    weight: np.ndarray  # float64[S]
    constant: np.ndarray  # float64[S]


def build_flows(model: Model, stream_weight: np.ndarray | None = None) -> Flows:
    """The streams beside ``build_graph(model, stream_weight)``."""
    weight = np.zeros(model.num_streams) if stream_weight is None else stream_weight
    no_cost = np.zeros_like(model.cost)
    matrices = [build_graph(replace(model, cost=no_cost, edge_cost=seconds)).matrix for seconds in model.edge_stream]
    edge = np.array(matrices) if matrices else np.zeros((0, 0))
    return Flows(model.node_stream, edge, weight, model.stream_constant)


def build_rows(model: Model) -> Rows:
    off, rows = row_index(model)
    scale = np.ones(model.num_slots)
    for pool in np.unique(model.slot_pool):
        here = model.slot_pool == pool
        scale[here] = max(float(model.slot_limit[here].max()), 1e-300)
    start, end = model.row_start, model.row_end
    return Rows(model.row_node, start, end, model.row_off, model.row_bytes, model.slot_limit, scale, off, rows)


def build_graph(model: Model, stream_weight: np.ndarray | None = None) -> Graph:
    """The half-edge form; ``stream_weight`` float64[S] adds the streams to the costs at these weights."""
    cost, edge_cost = model.cost, model.edge_cost
    if stream_weight is not None and len(stream_weight) and stream_weight.any():
        cost, edge_cost = cost + stream_weight @ model.node_stream, edge_cost + stream_weight @ model.edge_stream
    big = forbidden_cost(cost, edge_cost)
    sizes, num = model.sizes(), model.num_edges
    ends = np.concatenate([model.edge_u, model.edge_v])
    order = np.argsort(ends, kind="stable")
    half_off = np.zeros(model.num_nodes + 1, dtype=np.int64)
    np.cumsum(np.bincount(ends, minlength=model.num_nodes), out=half_off[1:])
    place = np.empty(2 * num, dtype=np.int64)
    place[order] = np.arange(2 * num)
    neighbor = np.concatenate([model.edge_v, model.edge_u])[order]
    back = place[(order + num) % (2 * num)] if num else np.zeros(0, dtype=np.int64)
    edge = order % num if num else np.zeros(0, dtype=np.int64)
    size = np.diff(model.edge_off)[edge] if num else np.zeros(0, dtype=np.int64)
    at = np.cumsum(size) - size  # in the order of half-edges: a node's matrices lie together
    matrix = np.empty(2 * len(edge_cost))
    _orient(order < num, edge, at, model.edge_u, model.edge_v, model.edge_off, sizes, np.minimum(edge_cost, big), matrix)
    return Graph(
        node_off=model.node_off,
        cost=np.minimum(cost, big),
        half_off=half_off,
        neighbor=neighbor,
        at=at,
        back=back,
        matrix=matrix,
        big=big,
    )


def forbidden_cost(cost: np.ndarray, edge_cost: np.ndarray) -> float:
    """More than any selection of finite entries can cost above another, with room for sums of a few thousand in float64."""
    finite = np.concatenate([cost[np.isfinite(cost)], edge_cost[np.isfinite(edge_cost)]])
    return 1e3 * float(np.abs(finite).max(initial=0.0)) * 10 + 1.0


@numba.njit(cache=True, nogil=True)
def _orient(forward, edge, at, eu, ev, edge_off, sizes, edge_cost, matrix):  # type: ignore[no-untyped-def]
    for h in range(len(edge)):
        e = edge[h]
        nu, nv, base = sizes[eu[e]], sizes[ev[e]], edge_off[e]
        for i in range(nu):
            for j in range(nv):
                matrix[at[h] + (i * nv + j if forward[h] else j * nu + i)] = edge_cost[base + i * nv + j]
