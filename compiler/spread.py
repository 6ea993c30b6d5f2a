"""Which of equal parameters gets which place: so that copies come evenly, since those that come in bursts queue.

The problem adds up a phase's copies. To it, ten layers in a row that fetch their optimizer state cost the same as every fifth that does.
Parameters alike in everything that the sums know exchange places here, as far as memory at every time allows.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator

import numpy as np

from .pricing import PricedProblem
from .residency import StatePlace

_NUM_TIMES = 64  # a step's computation in so many parts
_BLUR = np.array([0.25, 0.5, 0.25])  # a copy need not be made in the very part in which it is asked for
_LEAST_GAIN = 1e-5  # share of the sum of squares
_MORE = 1e-4  # share of the objective that an exchange may cost
_MAX_TRIES = 400
_Swap = tuple[float, int, int]  # (change of the sum of squares, two nodes)


def spread(priced: PricedProblem, selection: np.ndarray) -> np.ndarray:
    """A selection of (nearly) the same objective within the same limits, with the streams' load as even as exchanges make it: the sum of
    squares of the seconds that each stream has to do in each part of the step is least."""
    problem, selection = priced.problem, selection.copy()
    most = problem.evaluate(selection).objective * (1 + _MORE)
    tables = _tables(priced, selection)
    load = np.sum([table[selection[node]] for node, table in tables.items()], axis=0)
    groups = [members for members in _equals(priced, selection) if len(members) > 1 and len(set(selection[members])) > 1]
    refused: set[tuple[int, int, int, int]] = set()
    tries = 0
    while True:
        for _, a, b in sorted(swap for members in groups for swap in _swaps(members, selection, tables, load)):
            exchange = (a, b, int(selection[a]), int(selection[b]))
            if exchange in refused:
                continue
            if tries == _MAX_TRIES:
                return selection
            tries += 1
            other = selection.copy()
            other[a], other[b] = selection[b], selection[a]
            found = problem.evaluate(other)
            if found.feasible and found.objective <= most:
                load = load + sum(tables[node][other[node]] - tables[node][selection[node]] for node in (a, b))
                selection = other
                break
            refused.add(exchange)
        else:
            return selection


def _equals(priced: PricedProblem, selection: np.ndarray) -> list[np.ndarray]:
    """Nodes of parameters whose places cost the same, and whose narrow forms have the same place."""
    assert priced.uses is not None, "places were priced"
    costs, offsets = priced.problem.node_cost, priced.problem.node_offsets()
    nodes = {node.member: node.index for node in priced.places}
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for node in priced.places:
        if isinstance(node.options[0][1], StatePlace):
            cast = nodes.get(priced.uses.casts.get(node.member))
            cost = costs[offsets[node.index] : offsets[node.index + 1]].tobytes()
            shape = tuple(node.member.meta["val"].shape)
            groups[shape, tuple(node.options), cost, None if cast is None else int(selection[cast])].append(node.index)
    return [np.array(members) for members in groups.values()]


def _tables(priced: PricedProblem, selection: np.ndarray) -> dict[int, np.ndarray]:
    """Node → float64[options, streams x times]: the seconds that it gives each stream in each part of the step."""
    streams = list(dict.fromkeys(copy.stream for copy in priced.copies))
    end_s = max((copy.at_s for copy in priced.copies), default=0.0)
    out: dict[int, np.ndarray] = {}
    for copy in priced.copies:
        seconds = copy.seconds if copy.beside is None else copy.seconds[selection[copy.beside]]
        table = out.setdefault(copy.node, np.zeros((len(seconds), len(streams) * (_NUM_TIMES + 2))))
        at = streams.index(copy.stream) * (_NUM_TIMES + 2) + int((_NUM_TIMES - 1) * copy.at_s / max(end_s, 1e-12))
        table[:, at : at + len(_BLUR)] += seconds[:, None] * _BLUR
    return out


def _swaps(members: np.ndarray, selection: np.ndarray, tables: dict[int, np.ndarray], load: np.ndarray) -> Iterator[_Swap]:
    """Exchanges between members that make the load more even; of each with all others the best one."""
    chosen = selection[members]
    for one, other in itertools.combinations(sorted(set(chosen.tolist())), 2):
        a, b = members[chosen == one], members[chosen == other]
        u = np.array([tables[node][other] - tables[node][one] for node in a])
        v = np.array([tables[node][one] - tables[node][other] for node in b])
        changes = (2 * u @ load + (u * u).sum(axis=1))[:, None] + (2 * v @ load + (v * v).sum(axis=1))[None, :] + 2 * u @ v.T
        for i, j in zip(*np.nonzero(changes < -_LEAST_GAIN * (load @ load)), strict=True):
            yield float(changes[i, j]), int(a[i]), int(b[j])
