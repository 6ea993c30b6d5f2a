"""Prices of layout changes: messages per mesh axis, and the copies that bring a tensor's pieces together and apart around them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..cost_model.cluster import Cluster
from ..cost_model.collectives import collective_coefficients
from ..cost_model.kernels import work_seconds
from ..cost_model.work import op_work
from .layout import REPLICATED, Layout
from .reshard import ReshardError, Step, steps

FORBIDDEN = float("inf")
_COPIES = (1 << 10, 1 << 26)  # bytes of two copies, whose seconds make the line of all others


class _Price(NamedTuple):
    """Of a change of layout. own_s: latency of all messages but the last. last_s: of the last one, which other tensors may share.
    copy_s, copy_s_per_byte: of what the device rearranges before and behind them."""

    own_s: float
    last_s: float
    s_per_byte: float
    copy_s: float
    copy_s_per_byte: float


class Moved(NamedTuple):
    """How a tensor lies in memory, as far as its pieces can be sent from where they are.

    outermost: the one atom whose pieces are contiguous. sliced_in_place: atoms of which a piece is a view that its reader takes as it is.
    packed: sent with others from one buffer.
    """

    outermost: int
    sliced_in_place: frozenset[int] = frozenset()
    packed: bool = False


class CollectivePrices:
    """Latency and seconds per byte of layout changes on one mesh of a cluster; pairs of layouts are computed once."""

    def __init__(self, cluster: Cluster, mesh: tuple[int, ...]) -> None:
        self.mesh = mesh
        small, large = (work_seconds(op_work("clone", [(n,)], [(n,)], (), 1, 1), cluster.device) for n in _COPIES)
        self._copy_s_per_byte = (large - small) / (_COPIES[1] - _COPIES[0])
        self._copy_s = small
        links = [cluster.axis_link(mesh, axis) for axis in range(len(mesh))]
        self._coefficients = {
            (kind, axis): collective_coefficients(kind, mesh[axis], links[axis])
            for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
            for axis in range(len(mesh))
        }
        self._pairs: dict[tuple[Layout, Layout, Moved], _Price] = {}
        self._tables: dict[tuple[tuple[Layout, ...], tuple[Layout, ...], Moved], np.ndarray] = {}

    def pair(self, source: Layout, target: Layout, moved: Moved) -> _Price:
        """What it takes to bring a tensor from one layout to another; infinite where there is no way."""
        key = (source, target, moved)
        found = self._pairs.get(key)
        if found is None:
            found = self._pairs[key] = self._price(source, target, moved)
        return found

    def _price(self, source: Layout, target: Layout, moved: Moved) -> _Price:
        if source == target:
            return _Price(0.0, 0.0, 0.0, 0.0, 0.0)
        try:
            way = steps(source, target, self.mesh)
        except ReshardError:
            return _Price(FORBIDDEN, 0.0, 0.0, 0.0, 0.0)
        own = last = per_byte = copy = copied = 0.0
        previous: Step | None = None
        for step in way:
            copied += self._copied(step, moved)
            if step.kind == "slice":
                copy += self._copy_s if self._copied(step, moved) else 0.0
            if step.kind in ("slice", "zero"):
                continue
            latency, rate = self._coefficients[step.kind, step.axis]
            if previous is None or not (step.kind == previous.kind == "all_reduce" and step.source == previous.source):
                own, last = own + last, 0.0  # all-reduces of one kind are one message
            last += latency
            per_byte += rate * step.fraction
            previous = step
        return _Price(own, last, per_byte, copy, copied * self._copy_s_per_byte)

    def _copied(self, step: Step, moved: Moved) -> float:
        """Bytes that are copied for a step, over the tensor's: a piece of another dim than the outermost has to be brought together before
        it is sent, and apart when it has arrived."""
        n = self.mesh[step.axis]
        split, gathered = step.target not in (REPLICATED, moved.outermost), step.source not in (REPLICATED, moved.outermost)
        if step.kind == "slice":
            return step.fraction / n if split and step.target not in moved.sliced_in_place else 0.0
        if step.kind == "all_gather":
            return step.fraction * (1 + 1 / n if moved.packed else gathered)
        if step.kind == "all_to_all":
            return step.fraction / n * (split + gathered)
        if step.kind == "reduce_scatter":
            return step.fraction * max(split, moved.packed)
        return step.fraction if moved.packed or step.kind == "zero" else 0.0

    def matrices(
        self, a: list[Layout], b: list[Layout], num_bytes: float, moved: Moved, latency_share: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """float64[len(a), len(b)] seconds of messages, and of copies around them, between all layouts of two lists, for a tensor of
        `num_bytes` global bytes.

        latency_share: part of the last message's latency that falls to this tensor, where lowering sends several in one message. Those
        before it have none to go with.
        """
        ua, ia = _unique(a)
        ub, ib = _unique(b)
        key = (ua, ub, moved)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = np.array([[self.pair(x, y, moved) for y in ub] for x in ua])
        own, last, per_byte, copy, copied = np.moveaxis(table, -1, 0)
        index = np.ix_(ia, ib)
        return (own + last * latency_share + per_byte * num_bytes)[index], (copy + copied * num_bytes)[index]


def _unique(layouts: list[Layout]) -> tuple[tuple[Layout, ...], list[int]]:
    index: dict[Layout, int] = {}
    positions = [index.setdefault(layout, len(index)) for layout in layouts]
    return tuple(index), positions
