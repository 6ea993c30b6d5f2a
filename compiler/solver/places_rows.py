"""The local polytope of a model in few rows: what the linear relaxation of a problem with places is made of.

Statement
    For each edge, ``x_u`` and ``x_v`` are the margins of a distribution over allowed pairs. Rows of the matrix that differ by a
    constant (in cost and in every stream) are interchangeable: the constant moves to the node and one group of strategies stands for
    all of them; the same for columns. This changes neither the value nor the strength of the relaxation: a distribution over groups
    splits among the members in proportion to ``x``. What is left per edge, with ``R`` and ``C`` the sums of ``x`` over a group:
    - one group on either side: nothing;
    - a pair of groups that allow only each other: ``R = C``;
    - two by two with one forbidden pair: ``R + C <= 1``;
    - otherwise a variable per allowed pair of groups, with ``R`` and ``C`` as its margins.
    Layers repeat, so most edges share one of a few matrices, and all edges of a matrix are written at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .exact import Rows
from .model import Model

EQUAL = 1e-11
"""Relative difference of costs up to which lines of a matrix count as equal."""


@dataclass(slots=True)
class Template:
    """The rows of one matrix. Columns are local: strategies of ``u``, of ``v``, pairs of groups."""

    shift_u: np.ndarray  # float64[1 + S, strategies of u], inf = forbidden
    shift_v: np.ndarray
    pair: np.ndarray  # float64[1 + S, pairs of groups]
    upper: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)
    entries: tuple[list[tuple[int, int, float]], ...] = field(default_factory=lambda: ([], [], []))  # (row, column, value): u, v, pairs

    def add(self, members: tuple[np.ndarray, ...], signs: tuple[float, ...], upper: float, equal: bool) -> None:
        """A row over the given strategies of ``u``, of ``v`` and pairs."""
        for entries, columns, sign in zip(self.entries, members, signs, strict=True):
            entries.extend((len(self.upper), int(c), sign) for c in columns)
        self.upper.append(upper)
        self.equal.append(equal)


def equal_lines(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group the lines of ``matrix`` [channels, lines, width] that differ by a constant per channel.

    Returns the group of each line (-1: nothing allowed), each line's constants [channels, lines] and a first line of each group.
    """
    num = matrix.shape[1]
    allowed = np.isfinite(matrix[0])
    if matrix.shape[2] == 0:
        return np.full(num, -1), np.vstack([np.full((1, num), np.inf), np.zeros((len(matrix) - 1, num))]), np.zeros(0, dtype=np.int64)
    shift = matrix[:, np.arange(num), allowed.argmax(axis=1)].copy()
    shift[:, ~allowed.any(axis=1)] = 0.0
    rest = np.where(allowed[None], matrix - shift[:, :, None], 0.0)
    scale = EQUAL * float(np.abs(np.where(allowed[None], matrix, 0.0)).max(initial=0.0))
    keys = np.round(rest / scale) + 0.0 if scale > 0 else rest
    group = np.full(num, -1)
    first: list[int] = []
    seen: dict[bytes, int] = {}
    for i in np.flatnonzero(allowed.any(axis=1)):
        key = allowed[i].tobytes() + keys[:, i].tobytes()
        if key not in seen:
            seen[key] = len(first)
            first.append(int(i))
        group[i] = seen[key]
    shift[0, group < 0] = np.inf
    return group, shift, np.array(first, dtype=np.int64)


def make_template(matrix: np.ndarray) -> Template:
    """The rows of one matrix [1 + S, strategies of u, strategies of v]; channel 0 is the cost, infinite = forbidden."""
    group_u, shift_u, first = equal_lines(matrix)
    small = matrix[:, first] - shift_u[:, first][:, :, None]
    group_v, shift_v, first = equal_lines(small.transpose(0, 2, 1))
    small = small[:, :, first] - shift_v[:, first][:, None, :]
    allowed = np.isfinite(small[0])
    template = Template(shift_u, shift_v, np.zeros((len(matrix), 0)))
    members_u = [np.flatnonzero(group_u == i) for i in range(small.shape[1])]
    members_v = [np.flatnonzero(group_v == j) for j in range(small.shape[2])]
    if min(allowed.shape) <= 1:
        return template  # one group on either side leaves one pair, whose cost the shifts have taken
    if allowed.shape == (2, 2) and allowed.sum() == 3:
        _conflict(template, small, members_u, members_v)
    else:
        _pairs(template, small, members_u, members_v)
    return template


def _conflict(template: Template, small: np.ndarray, members_u: list[np.ndarray], members_v: list[np.ndarray]) -> None:
    """Two by two groups, one pair forbidden: the costs of the other three are sums of node costs."""
    i, j = np.argwhere(~np.isfinite(small[0]))[0]
    base = small[:, 1 - i, 1 - j]
    template.shift_u += base[:, None]
    template.shift_u[:, members_u[i]] += (small[:, i, 1 - j] - base)[:, None]
    template.shift_v[:, members_v[j]] += (small[:, 1 - i, j] - base)[:, None]
    template.add((members_u[i], members_v[j], np.zeros(0)), (1.0, 1.0, 0.0), 1.0, False)


def _pairs(template: Template, small: np.ndarray, members_u: list[np.ndarray], members_v: list[np.ndarray]) -> None:
    """A variable per allowed pair of groups, none where two groups allow only each other."""
    allowed = np.isfinite(small[0])
    only = allowed & (allowed.sum(axis=1) == 1)[:, None] & (allowed.sum(axis=0) == 1)[None, :]
    for i, j in np.argwhere(only):
        template.shift_u[:, members_u[i]] += small[:, i, j][:, None]
        template.add((members_u[i], members_v[j], np.zeros(0)), (1.0, -1.0, 0.0), 0.0, True)
    u, v = np.nonzero(allowed & ~only)
    template.pair = small[:, u, v]
    nothing = np.zeros(0)
    for i in np.unique(u):
        template.add((members_u[i], nothing, np.flatnonzero(u == i)), (-1.0, 0.0, 1.0), 0.0, True)
    for j in np.unique(v):
        template.add((nothing, members_v[j], np.flatnonzero(v == j)), (0.0, -1.0, 1.0), 0.0, True)


@dataclass(slots=True)
class Polytope:
    """Columns: strategies, then pairs of groups. ``channel``: costs (infinite = forbidden) and streams of all of them."""

    rows: Rows
    channel: np.ndarray  # float64[1 + S, columns]


def local_polytope(model: Model) -> Polytope:
    """The rows of all nodes (one strategy each) and edges."""
    num = len(model.cost)
    node = np.vstack([model.cost[None], model.node_stream])
    rows = Rows()
    pairs: list[np.ndarray] = []
    one = np.ones(model.num_nodes)
    rows.add(np.repeat(np.arange(model.num_nodes), model.sizes()), np.arange(num), np.ones(num), one, one)
    for template, edges in _by_matrix(model):
        first_u, first_v = model.node_off[model.edge_u[edges]], model.node_off[model.edge_v[edges]]
        _add_shift(node, first_u, template.shift_u)
        _add_shift(node, first_v, template.shift_v)
        size = template.pair.shape[1]
        first_pair = num + sum(p.shape[1] for p in pairs) + size * np.arange(len(edges))
        pairs.append(np.tile(template.pair, len(edges)))
        _write(rows, template, (first_u, first_v, first_pair))
    return Polytope(rows, np.hstack([node, *pairs]))


def _by_matrix(model: Model) -> list[tuple[Template, np.ndarray]]:
    """Templates with their edges, in the order of the first edge."""
    groups: dict[tuple[int, bytes], list[int]] = {}
    sizes = model.sizes()
    for e in range(model.num_edges):
        a, b = model.edge_off[e], model.edge_off[e + 1]
        key = (int(sizes[model.edge_u[e]]), model.edge_cost[a:b].tobytes() + model.edge_stream[:, a:b].tobytes())
        groups.setdefault(key, []).append(e)
    out = []
    for (size, _), edges in groups.items():
        a, b = model.edge_off[edges[0]], model.edge_off[edges[0] + 1]
        matrix = np.vstack([model.edge_cost[None, a:b], model.edge_stream[:, a:b]]).reshape(1 + model.num_streams, size, -1)
        out.append((make_template(matrix), np.array(edges)))
    return out


def _add_shift(node: np.ndarray, first: np.ndarray, shift: np.ndarray) -> None:
    columns = (first[:, None] + np.arange(shift.shape[1])[None, :]).ravel()
    for channel, values in zip(node, shift, strict=True):
        np.add.at(channel, columns, np.tile(values, len(first)))


def _write(rows: Rows, template: Template, firsts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """The template's rows for every edge; ``firsts``: where its strategies of u, of v and pairs begin."""
    height, num = len(template.upper), len(firsts[0])
    if height == 0:
        return
    row, column, value = [], [], []
    for entries, first in zip(template.entries, firsts, strict=True):
        if entries:
            r, c, v = (np.array(a) for a in zip(*entries, strict=True))
            row.append((height * np.arange(num)[:, None] + r[None, :]).ravel())
            column.append((first[:, None] + c[None, :]).ravel())
            value.append(np.tile(v, num))
    upper = np.array(template.upper)
    lower = np.where(template.equal, upper, -np.inf)
    rows.add(np.concatenate(row), np.concatenate(column), np.concatenate(value), np.tile(lower, num), np.tile(upper, num))
