"""Which of equal parameters gets which place: so that copies come evenly, since those that come in bursts queue.

The problem adds up a phase's copies. To it, ten layers in a row that fetch their optimizer state cost the same as every fifth that does.
Parameters alike in everything that the sums know exchange places here, as far as memory at every time allows.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .place_nodes import Copies
from .pricing import PricedProblem
from .residency import StatePlace

_NUM_TIMES = 64  # a step's computation in so many parts
_LEAST_GAIN = 1e-5  # share of the sum of squares
_MORE = 1e-4  # share of the objective that an exchange may cost
_MAX_TRIES = 400
_Member = tuple[int, ...]  # the nodes of a parameter and, where it has one, of its narrow form
_Kind = tuple[int, ...]  # what is selected for them
_Swap = tuple[float, _Member, _Member]  # with the change of the sum of squares


def spread(priced: PricedProblem, selection: np.ndarray) -> np.ndarray:
    """A selection of (nearly) the same objective within the same limits, with the streams' load as even as exchanges make it: the sum of
    squares of the seconds that each stream has to do in each part of the step is least."""
    problem, loads = priced.problem, _Loads(priced)
    most = problem.evaluate(selection).objective * (1 + _MORE)
    groups = [members for members in _equals(priced) if len({_kind(member, selection) for member in members}) > 1]
    load = loads.total(selection)
    refused: set[tuple[_Member, _Member, _Kind, _Kind]] = set()
    tries = 0
    while True:
        for _, a, b in sorted(swap for members in groups for swap in _swaps(members, selection, loads, load)):
            kinds = _kind(a, selection), _kind(b, selection)
            if (a, b, *kinds) in refused:
                continue
            if tries == _MAX_TRIES:
                return selection
            tries += 1
            other = selection.copy()
            other[list(a)], other[list(b)] = kinds[1], kinds[0]
            found = problem.evaluate(other)
            if found.feasible and found.objective <= most:
                load = load + sum(loads.of(member, _kind(member, other)) - loads.of(member, _kind(member, selection)) for member in (a, b))
                selection = other
                break
            refused.add((a, b, *kinds))
        else:
            return selection


def _kind(member: _Member, selection: np.ndarray) -> _Kind:
    return tuple(int(selection[node]) for node in member)


def _equals(priced: PricedProblem) -> list[list[_Member]]:
    """Parameters whose places, and those of their narrow forms, cost the same."""
    assert priced.uses is not None, "places were priced"
    costs, offsets = priced.problem.node_cost, priced.problem.node_offsets()
    nodes = {node.member: node for node in priced.places}
    groups: dict[Hashable, list[_Member]] = defaultdict(list)
    for node in priced.places:
        if isinstance(node.options[0][1], StatePlace):
            cast = priced.uses.casts.get(node.member)
            both = [node, *([nodes[cast]] if cast in nodes else [])]
            cost = tuple(costs[offsets[n.index] : offsets[n.index + 1]].tobytes() for n in both)
            alike = tuple(node.member.meta["val"].shape), cost, *(tuple(n.options) for n in both)
            groups[alike].append(tuple(n.index for n in both))
    return list(groups.values())


@dataclass(slots=True)
class _Loads:
    """What the nodes of places give the streams to do: float64[streams x times] seconds; the step is the middle third of the times."""

    priced: PricedProblem
    copies: dict[int, list[Copies]] = field(default_factory=lambda: defaultdict(list))
    streams: list[str] = field(default_factory=list)
    end_s: float = 0.0
    known: dict[tuple[_Member, _Kind], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for copy in self.priced.copies:
            self.copies[copy.node].append(copy)
        self.streams = list(dict.fromkeys(copy.stream for copy in self.priced.copies))
        self.end_s = max((copy.at_s for copy in self.priced.copies), default=0.0) + 1e-12

    def total(self, selection: np.ndarray) -> np.ndarray:
        """Of all nodes."""
        beside = {copy.node: copy.beside for copy in self.priced.copies if copy.beside is not None}
        members = [(node, beside[node]) if node in beside else (node,) for node in self.copies]
        return np.sum([self.of(member, _kind(member, selection)) for member in members], axis=0)

    def of(self, member: _Member, kind: _Kind) -> np.ndarray:
        """Of a parameter."""
        if (member, kind) not in self.known:
            out = np.zeros((len(self.streams), 3 * _NUM_TIMES))
            for copy in self.copies[member[0]]:
                seconds = float(copy.seconds[kind[0]] if copy.beside is None else copy.seconds[kind[1], kind[0]])
                at = _NUM_TIMES + int(_NUM_TIMES * copy.at_s / self.end_s)
                # It keeps its stream busy for so long, and need not be made in the very part in which it is asked for.
                reach = min(max(1, round(_NUM_TIMES * seconds / self.end_s / 2)), _NUM_TIMES - 1)
                out[self.streams.index(copy.stream), at - reach : at + reach + 1] += seconds / (2 * reach + 1)
            self.known[member, kind] = out.ravel()
        return self.known[member, kind]


def _swaps(members: list[_Member], selection: np.ndarray, loads: _Loads, load: np.ndarray) -> Iterator[_Swap]:
    """Exchanges between members that make the load more even."""
    kinds = [_kind(member, selection) for member in members]
    for one, other in itertools.combinations(sorted(set(kinds)), 2):
        a, b = ([member for member, kind in zip(members, kinds, strict=True) if kind == this] for this in (one, other))
        u = np.array([loads.of(member, other) - loads.of(member, one) for member in a])
        v = np.array([loads.of(member, one) - loads.of(member, other) for member in b])
        changes = (2 * u @ load + (u * u).sum(axis=1))[:, None] + (2 * v @ load + (v * v).sum(axis=1))[None, :] + 2 * u @ v.T
        for i, j in zip(*np.nonzero(changes < -_LEAST_GAIN * (load @ load)), strict=True):
            yield float(changes[i, j]), a[i], b[j]
