"""Equal sub-graphs folded into one, for bounds: nodes that the priced problem cannot tell apart are one node that counts several times.

Statement
    Colours of nodes are *equitable* if nodes of one colour have the same costs (and stream seconds, and bytes in the slots that have a
    price) and, for every colour and matrix, as many edges with that matrix to nodes of that colour. The folded problem has a node per
    colour, with the costs of all its members together, and an edge per pair of colours likewise. Its messages, shared equally among the
    edges that an edge stands for, re-distribute the costs of the whole problem, so that every minimum there is the folded one divided by
    the number of members: a bound that messages give for the folded problem is one of the whole. (Grohe, Kersting, Mladenov and Selman,
    "Dimension reduction via colour refinement", ESA 2014, show that linear programs keep their value.)
    A selection of the folded problem is one of the whole in which members choose alike. The best one need not be of that kind.
Colours
    Refinement: begin with what the node itself is, split by the multiset of (matrix, colour at the other end) until nothing splits. Two
    colours with more than one kind of edge between them, or edges within a colour, would fold into parallel edges and loops: the members of
    such a colour stay single.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .graph import Graph
from .model import Model
from .substitute import without_slots

LEAST_GAIN = 0.7
"""Folding pays if no more than this share of the nodes is left."""


@dataclass(slots=True)
class Fold:
    """A model whose equal nodes are one. ``small`` has no memory; its streams' constants are the whole model's."""

    small: Model
    colour: np.ndarray  # int64[N]
    count: np.ndarray  # int64[colours]
    strategy: np.ndarray  # int64[sum strategies] strategy of the folded model

    def sums(self, values: np.ndarray) -> np.ndarray:
        """float64[folded strategies]: values of all members together."""
        return np.bincount(self.strategy, values, len(self.small.cost))

    def is_even(self, values: np.ndarray) -> bool:
        """Whether members agree in values per strategy."""
        each = self.sums(values) / np.repeat(self.count, self.small.sizes())
        return bool((np.abs(each[self.strategy] - values) <= 1e-12 * np.abs(values)).all())


def fold(model: Model, usages: Sequence[np.ndarray] = ()) -> Fold | None:
    """The folded model; None where too few nodes are equal. usages: float64[sum strategies] each, what members have to agree in besides."""
    own = [model.cost, *model.node_stream, *usages]
    bounds = list(zip(model.node_off[:-1].tolist(), model.node_off[1:].tolist(), strict=True))
    first = _numbers(b"|".join(values[a:b].tobytes() for values in own) for a, b in bounds)
    matrix = _numbers(
        b"%d|" % width + model.edge_cost[a:b].tobytes() + model.edge_stream[:, a:b].tobytes()
        for width, a, b in zip(model.sizes()[model.edge_u].tolist(), model.edge_off[:-1].tolist(), model.edge_off[1:].tolist(), strict=True)
    )
    colour = _refined(model, first, matrix)
    while (loose := _not_simple(model, colour, matrix)).any():
        first = np.where(loose[colour], np.arange(model.num_nodes) + first.max() + 1, first)
        colour = _refined(model, _dense(first), matrix)
    if colour.max(initial=-1) + 1 > LEAST_GAIN * model.num_nodes:
        return None
    return _folded(model, colour)


def expand(folded: Fold, small: Graph, small_off: np.ndarray, msg: np.ndarray, graph: Graph, off: np.ndarray) -> np.ndarray:
    """Messages of the whole graph: those of the folded one, shared equally among the edges that an edge stands for."""
    entry, times = _entries(folded, small, small_off, graph, off)
    return msg[entry] / times


def collapse(folded: Fold, small: Graph, small_off: np.ndarray, graph: Graph, off: np.ndarray, msg: np.ndarray) -> np.ndarray:
    """The reverse of `expand`, for messages that are equal where edges are."""
    entry, times = _entries(folded, small, small_off, graph, off)
    out = np.zeros(int(small_off[-1]))
    out[entry] = msg * times
    return out


def _numbers(keys: Iterable[Hashable]) -> np.ndarray:
    """int64: equal keys, equal numbers, in the order of first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def _dense(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _refined(model: Model, colour: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The coarsest equitable colours that are finer than ``colour``, numbered in the order of their first nodes."""
    num = model.num_nodes
    owner = np.concatenate([model.edge_u, model.edge_v])
    other = np.concatenate([model.edge_v, model.edge_u])
    kind = np.concatenate([2 * matrix, 2 * matrix + 1])
    off = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=num))]).tolist()
    while True:
        key = kind * (num + 1) + colour[other]
        sorted_keys = key[np.lexsort((key, owner))]
        finer = _numbers((c, sorted_keys[off[n] : off[n + 1]].tobytes()) for n, c in enumerate(colour.tolist()))
        if finer.max(initial=-1) == colour.max(initial=-1):
            return finer
        colour = finer


def _not_simple(model: Model, colour: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """bool[colours]: those that have edges within, or of two kinds to another colour, and several members."""
    num = int(colour.max(initial=-1)) + 1
    u, v = colour[model.edge_u], colour[model.edge_v]
    low, high, kind = np.minimum(u, v), np.maximum(u, v), 2 * matrix + (u > v)
    kinds = np.unique(np.stack([low, high, kind]), axis=1)
    pairs, times = np.unique(kinds[:2], axis=1, return_counts=True)
    bad = (times > 1) | (pairs[0] == pairs[1])
    out = np.zeros(num, dtype=bool)
    out[pairs[:, bad].ravel()] = True
    return out & (np.bincount(colour, minlength=num) > 1)


def _folded(model: Model, colour: np.ndarray) -> Fold:
    num = int(colour.max()) + 1
    count = np.bincount(colour, minlength=num)
    member = np.full(num, model.num_nodes)
    np.minimum.at(member, colour, np.arange(model.num_nodes))
    sizes = model.sizes()[member]
    node_off = np.concatenate([[0], np.cumsum(sizes)])
    strategy = np.arange(len(model.cost)) + np.repeat(node_off[colour] - model.node_off[:-1], model.sizes())
    u, v = colour[model.edge_u], colour[model.edge_v]
    pairs, edge, times = np.unique(np.minimum(u, v) * num + np.maximum(u, v), return_index=True, return_counts=True)
    channels = np.vstack([model.edge_cost[None], model.edge_stream])
    parts = []
    for e, n in zip(edge.tolist(), times.tolist(), strict=True):
        part = channels[:, model.edge_off[e] : model.edge_off[e + 1]] * n
        if u[e] > v[e]:
            part = part.reshape(len(part), sizes[u[e]], sizes[v[e]]).transpose(0, 2, 1).reshape(len(part), -1)
        parts.append(part)
    edges = np.hstack(parts) if parts else channels[:, :0]
    small = replace(
        without_slots(model), node_off=node_off, cost=np.bincount(strategy, model.cost, int(node_off[-1])),
        node_stream=np.array([np.bincount(strategy, s, int(node_off[-1])) for s in model.node_stream]).reshape(-1, int(node_off[-1])),
        edge_u=pairs // num, edge_v=pairs % num, edge_off=np.concatenate([[0], np.cumsum([p.shape[1] for p in parts], dtype=np.int64)]),
        edge_cost=edges[0].copy(), edge_stream=edges[1:].copy(),
    )  # fmt: skip
    return Fold(small, colour, count, strategy)


def _entries(folded: Fold, small: Graph, small_off: np.ndarray, graph: Graph, off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each entry of the whole graph's messages that of the folded one's, and how many edges stand behind it."""
    num = len(folded.count)
    small_key = np.repeat(np.arange(num), np.diff(small.half_off)) * num + small.neighbor
    owner = np.repeat(np.arange(len(folded.colour)), np.diff(graph.half_off))
    order = np.argsort(small_key)
    at = order[np.searchsorted(small_key[order], folded.colour[owner] * num + folded.colour[graph.neighbor])]
    times, length = np.bincount(at, minlength=len(small_key))[at], np.diff(off)
    return np.arange(int(off[-1])) + np.repeat(small_off[:-1][at] - off[:-1], length), np.repeat(times, length)
