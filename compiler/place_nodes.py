"""What the nodes of places have in common (`price_places`): their form, the clock of the computation, copies, edges, memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from ..cost_model.cluster import Cluster
from ..cost_model.transfers import transfer_coefficients
from .choices import Choice
from .residency import DISK, HOST, StatePlace, Uses

if TYPE_CHECKING:
    from .pricing import Pricer

FORBIDDEN = float("inf")
LEAST_SHARE = 1e-4  # what is smaller than this share of all is not worth a decision: it stays on the device
NEVER_FREE = 0.003  # share of a hidden copy's seconds that counts all the same: of plans that hide all they move, the one that moves least

DIRECTIONS = {
    (HOST, "out"): "device_to_host", (HOST, "in"): "host_to_device", (DISK, "out"): "host_to_disk", (DISK, "in"): "disk_to_host",
}  # fmt: skip


@dataclass(slots=True)
class Seconds:
    """Seconds per stream and phase (see `overlap`), each an array over the options of a node or an edge."""

    of: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def add(self, stream: str, phase: str, seconds: np.ndarray) -> None:
        """Add to one of them."""
        self.of[stream, phase] = self.of.get((stream, phase), 0.0) + seconds


@dataclass(slots=True)
class PlaceNode:
    """A node of the problem: the place of a unit's results, or of a parameter. options: (size class, place)."""

    index: int
    member: fx.Node
    options: list[tuple[int, str | StatePlace]]


Saved = Mapping[str, np.ndarray]
"""Seconds of computation that a phase is spared, per option."""


@dataclass(frozen=True, slots=True)
class Copies:
    """What a node has to do in a stream at a time of the step. at_s: seconds of computation before it. seconds: per option of the node, or
    per option of `beside` and of it."""

    node: int
    stream: str
    at_s: float
    seconds: np.ndarray
    beside: int | None = None


class PlaceNodes:
    """The nodes of one problem, and what is needed to add one. tiers: pools beside the device's."""

    def __init__(self, pricer: Pricer, tiers: Sequence[str]) -> None:
        self.pricer, self.graph, self.tiers = pricer, pricer.graph, tuple(tiers)
        self.cluster: Cluster = pricer.cluster
        self.overlap = pricer.overlap
        self.uses = Uses(pricer.graph.step)
        self.order = self.uses.order
        self.end = len(self.order)
        self.num_runs = pricer.num_runs("bwd")  # of what happens in forward and backward passes
        self.needed, self.needed_by_block = self._first_needs()
        self.of: dict[fx.Node, PlaceNode] = {}
        self.copies: list[Copies] = []
        self._between: dict[tuple[int, bytes], int] = {}  # (choice, which options are alike) → node
        self.clock = np.zeros(0)

    def read_clock(self) -> None:
        """To be called once the choices have their prices, and before what asks for times."""
        self.clock = self._running_seconds()

    def _running_seconds(self) -> np.ndarray:
        """float64[nodes + 1]: seconds of computation before each position, every op at its fastest."""
        seconds = np.zeros(self.end + 1)
        for node, at in self.order.items():
            choice = self.graph.op_choice.get(node)
            if choice is not None:
                seconds[at + 1] = float(self.pricer.op_seconds[choice.index].min())
        return np.cumsum(seconds)

    def seconds_of(self, unit: fx.Node) -> float:
        """An op at its fastest."""
        at = self.order[unit]
        return float(self.clock[at + 1] - self.clock[at])

    def at(self, seconds: float) -> int:
        """The position at which the computation has taken so long."""
        return min(max(bisect_left(self.clock, seconds) - 1, 0), self.end)

    def before(self, position: int, seconds: float) -> int:
        """The position so many seconds of computation before another, which itself it is for none."""
        return min(position, self.at(self.clock[position] - seconds)) if seconds else position

    def _first_needs(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """Unit → the first position behind the forward pass where it is needed: by whoever, and by its own block or directly."""
        anyone: dict[fx.Node, int] = {}
        own: dict[fx.Node, int] = {}
        uses = self.uses
        for unit in reversed(uses.units):
            direct = min((self.order[op] for op in uses.later[unit]), default=self.end)
            block = [own[c] for c in uses.consumers[unit] if uses.segment[c] == uses.segment[unit]]
            others = [own[c] for c in uses.consumers[unit] if uses.segment[c] != uses.segment[unit]]
            own[unit] = min([direct, *block])
            anyone[unit] = min([own[unit], *others])
        return anyone, own

    def copy_s(self, tier: str, way: str, num_bytes: np.ndarray) -> np.ndarray:
        """Seconds of copies of so many bytes between the device and a tier, "in" or "out"."""
        fixed, per_byte = transfer_coefficients(DIRECTIONS[tier, way], self.cluster)
        return np.where(num_bytes > 0, fixed + per_byte * num_bytes, 0.0)

    def ahead_s(self, tier: str, way: str, num_bytes: np.ndarray) -> float:
        """Seconds that a copy has its memory on the device beside the computation: those it takes, none without prefetching."""
        return float(self.copy_s(tier, way, num_bytes).max()) if self.pricer.prefetch else 0.0

    def add(
        self, member: fx.Node, options: list, seconds: Seconds, at_s: Mapping[str, float], exposed: np.ndarray | float = 0.0,
        saved: Saved | None = None,
    ) -> PlaceNode:  # fmt: skip
        """A node for a unit or a parameter. at_s: when it is that a phase copies. exposed: seconds that count in full."""
        costs = np.zeros(len(options)) + exposed + sum(NEVER_FREE * each for each in seconds.of.values())
        streams = self.overlap.of(seconds.of)
        for phase, less in (saved or {}).items():
            costs = costs - self.pricer.cost_of(less)
            add_streams(streams, self.pricer.hidden_behind(-less, phase))
        index = self.pricer.builder.add_node(costs, streams or None)
        node = self.of[member] = PlaceNode(index, member, options)
        self.copies += [Copies(index, stream, at_s[phase], each) for (stream, phase), each in seconds.of.items() if phase in at_s]
        return node

    def edge(self, choice: Choice, node: PlaceNode, cost: np.ndarray, streams: dict[str, np.ndarray]) -> None:
        """An edge between a choice and a place. Options of the choice that mean the same to the place stand behind one option of a node
        between the two, which the places of all equal layers share: a quarter of the entries, and less."""
        lines, group = np.unique(np.hstack([cost, *streams.values()]), axis=0, return_inverse=True)
        if 2 * len(lines) > len(cost):
            self.pricer.builder.add_edge(choice.index, node.index, cost, streams)
            return
        key = choice.index, group.tobytes()
        if key not in self._between:
            self._between[key] = self.pricer.builder.add_node(np.zeros(len(lines)))
            belongs = group[:, None] == np.arange(len(lines))[None, :]
            self.pricer.builder.add_edge(choice.index, self._between[key], np.where(belongs, 0.0, FORBIDDEN))
        parts = np.hsplit(lines, 1 + len(streams))
        self.pricer.builder.add_edge(self._between[key], node.index, parts[0], dict(zip(streams, parts[1:], strict=True)))

    def use(self, node: PlaceNode, pool: str, start: int, end: int, num_bytes: np.ndarray) -> None:
        """Bytes per option in a pool between two positions."""
        if end > start and num_bytes.any():
            self.pricer.builder.add_usage(node.index, pool, start, end, num_bytes)


def add_streams(streams: dict[str, np.ndarray], more: Mapping[str, np.ndarray] | None) -> None:
    """Add to the seconds of streams of the selection problem."""
    for name, seconds in (more or {}).items():
        streams[name] = streams.get(name, 0.0) + seconds


def is_place(options: Sequence[tuple[int, object]], place: str) -> np.ndarray:
    """bool[options]: those of a place."""
    return np.array([p == place for _, p in options])
