"""Prices of places: where forward results and parameters live, as nodes of the selection problem beside those of the choice graph.

One node per unit (see `residency`) and per trained parameter, *not* shared between equal layers. Its options are (size class, place): the
local bytes that the layouts chosen for its tensors leave, which edges tie to the layout's choice, times what may become of it.

Memory. Kept: from the op that makes it to its last reader. Offloaded: until the copy can be complete behind the last forward reader, and
again from when fetching must start (without prefetching: no longer than it is read, which needs the least memory); between, in the pool
of its tier. Recomputed: until the last forward reader, and again from the first time it, or something made from it in the same block, is
asked for. Times are positions in the step graph; seconds are turned into positions by the running sum of the ops' seconds.

Time. A copy is in the stream of its direction and costs what the computation of its phase cannot hide (`overlap`). Running an op again
costs what it cost. The narrow form of a parameter (`Uses.casts`) is a unit like any other, only that where it is fetched its second making
is a second fetch.

Along a chain of recomputation every operand must be there: an edge forbids "recompute" beside a dropped operand, and beside an operand that
an earlier block would have to make again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from .choices import Choice
from .layout import num_pieces
from .overlap import BWD, FWD, STREAMS
from .place_nodes import FORBIDDEN, LEAST_SHARE, Copies, PlaceNode, PlaceNodes, Seconds, is_place
from .place_recipes import AUTO, DROP, PlaceRestriction, place_restriction
from .price_parameters import ParameterPlaces
from .residency import DEVICE, KEEP, RECOMPUTE, SMALL_BYTES, results

if TYPE_CHECKING:
    from .pricing import Pricer


class PlacePricer:
    """Adds the nodes of places to a pricer's problem. `units` and `parameters` are known from `__init__` on, so that the pricer leaves
    their memory to them."""

    def __init__(self, pricer: Pricer, tiers: Sequence[str], recipe: str = AUTO) -> None:
        """tiers: pools beside the device's. recipe: see `place_recipes`."""
        self._pricer, self._graph, self._recipe = pricer, pricer.graph, recipe
        self._nodes = PlaceNodes(pricer, tiers)
        self.uses = self._uses = self._nodes.uses
        self._order = self._uses.order
        self.units = self._worth_deciding()
        self.parameters = ParameterPlaces(self._nodes)
        self._casts = set(self._uses.casts.values())

    def add(self) -> list[PlaceNode]:
        """Add all nodes, edges and memory; called once the choices have theirs."""
        self._nodes.read_clock()
        self._allowed: PlaceRestriction = place_restriction(self._recipe, self._uses, self.units, self._nodes.seconds_of, self._nodes.tiers)
        for unit, num_bytes in self.units.items():
            self._unit(unit, num_bytes)
        for unit in self.units:
            self._chain(unit)
        self.parameters.add(self._allowed)
        return list(self._nodes.of.values())

    @property
    def copies(self) -> list[Copies]:
        """What the nodes copy, and when."""
        return self._nodes.copies

    def _worth_deciding(self) -> dict[fx.Node, int]:
        """Units that get a node, with their global bytes."""
        uses = self._uses
        sizes = {u: sum(v.meta["val"].numel() * v.meta["val"].element_size() for v in results(u)) for u in uses.units}
        least = max(SMALL_BYTES, LEAST_SHARE * sum(sizes.values()))
        wanted = {u for u in uses.units if uses.later[u]}
        for unit in reversed(uses.units):  # what others may be made from again
            if unit in wanted:
                wanted.update(p for p in uses.producers[unit] if uses.segment[p] == uses.segment[unit])
        return {u: sizes[u] for u in uses.units if u in wanted and sizes[u] >= least and u not in uses.outputs}

    def _tie(self, unit: fx.Node) -> Choice:
        """The choice whose layout says how large a unit's results are."""
        largest = max(results(unit), key=lambda v: v.meta["val"].numel())
        return self._graph.kept.get(largest, self._graph.op_choice[unit])

    def _unit(self, unit: fx.Node, num_bytes: int) -> None:
        tie, op = self._tie(unit), self._graph.op_choice[unit]
        layouts = tie.options if tie is not op else [s.results[0] or next(r for r in s.results if r is not None) for s in tie.options]
        pieces = np.array([num_pieces(layout, self._graph.mesh) for layout in layouts])
        classes = sorted(set(pieces.tolist()))
        places = [KEEP, RECOMPUTE] if self._uses.later[unit] else [DROP, RECOMPUTE, KEEP]
        if self._uses.later[unit] and unit not in self._casts:
            places += self._nodes.tiers
        places = self._allowed.of_unit(unit, places)
        options = [(c, place) for c in classes for place in places]
        local = np.array([num_bytes / c for c, _ in options])
        seconds = Seconds()
        for tier in self._nodes.tiers:
            for way, phase in (("out", FWD), ("in", BWD)):
                moved = np.where(is_place(options, tier), self._nodes.num_runs * self._nodes.copy_s(tier, way, local), 0.0)
                seconds.add(STREAMS[tier, way], phase, moved)
        clock = self._nodes.clock
        at_s = {FWD: float(clock[self._order[self._uses.last_fwd[unit]]]), BWD: float(clock[self._nodes.needed[unit]])}
        node = self._nodes.add(unit, options, seconds, at_s)
        self._tie_sizes(tie, pieces, node, op, recomputed=True)
        if tie is not op:
            self._tie_sizes(op, None, node, op, recomputed=True)
        self._unit_memory(unit, node, local)

    def _tie_sizes(self, choice: Choice, pieces: np.ndarray | None, node: PlaceNode, op: Choice, *, recomputed: bool) -> None:
        """An edge: the size class must be that of the chosen layout, and an op that runs again costs its seconds again."""
        cost = np.zeros((len(choice.options), len(node.options)))
        streams = None
        if recomputed and choice is op:
            again = self._nodes.num_runs * is_place(node.options, RECOMPUTE)[None, :]
            cost += self._pricer.op_costs[op.index][:, None] * again
            streams = self._pricer.hidden_behind(self._pricer.op_seconds[op.index][:, None] * again, BWD)
        if pieces is not None:
            fits = pieces[:, None] == np.array([c for c, _ in node.options])[None, :]
            cost = np.where(fits, cost, FORBIDDEN)
        if np.any(cost):
            self._nodes.edge(choice, node, cost, streams or {})

    def _unit_memory(self, unit: fx.Node, node: PlaceNode, local: np.ndarray) -> None:
        uses, order = self._uses, self._order
        made, read = order[unit], order[uses.last_fwd[unit]] + 1
        need = self._nodes.needed[unit] if self._pricer.prefetch else self._read_again(unit)
        read_again = [order[op] + 1 for op in uses.later[unit]] + [self._nodes.needed_by_block[c] + 1 for c in uses.consumers[unit]]
        end = min(max(read_again, default=read), self._nodes.end)
        again = min(self._nodes.needed_by_block[unit], end)
        self._nodes.use(node, DEVICE, made, max(read, end), local * is_place(node.options, KEEP))
        self._nodes.use(node, DEVICE, made, read, local * (is_place(node.options, RECOMPUTE) | is_place(node.options, DROP)))
        self._nodes.use(node, DEVICE, again, end, local * is_place(node.options, RECOMPUTE))
        for tier in self._nodes.tiers:
            chosen = local * is_place(node.options, tier)
            if not chosen.any():
                continue
            out = self._nodes.ahead_s(tier, "out", local)
            back = self._nodes.ahead_s(tier, "in", local)
            gone = max(read + 1, self._nodes.at(self._nodes.clock[read] + out))
            start = min(need, max(self._nodes.before(need, back), gone))
            self._nodes.use(node, DEVICE, made, gone, chosen)
            self._nodes.use(node, DEVICE, max(start, gone), end, chosen)
            self._nodes.use(node, tier, made, end, chosen)

    def _read_again(self, unit: fx.Node) -> int:
        """The first position behind the forward pass where an op reads a unit's results for itself."""
        return min((self._order[op] for op in self._uses.later[unit]), default=self._nodes.end)

    def _chain(self, unit: fx.Node) -> None:
        """What a unit that is made again reads must be there."""
        node = self._nodes.of[unit]
        for producer in self._uses.producers[unit]:
            other = self._nodes.of.get(producer)
            if other is None:
                self._operand_memory(unit, node, producer)
                continue
            missing = is_place(other.options, DROP)
            if self._uses.segment[producer] != self._uses.segment[unit]:
                missing = missing | is_place(other.options, RECOMPUTE)
            if not self._pricer.prefetch and self._nodes.needed_by_block[unit] < self._read_again(producer):
                # Not back yet: here a copy is back where it is read, and only there.
                missing = missing | np.logical_or.reduce([is_place(other.options, tier) for tier in self._nodes.tiers])
            bad = missing[:, None] & is_place(node.options, RECOMPUTE)[None, :]
            if bad.any():
                self._pricer.builder.add_edge(other.index, node.index, np.where(bad, FORBIDDEN, 0.0))

    def _operand_memory(self, unit: fx.Node, node: PlaceNode, producer: fx.Node) -> None:
        """What is always kept (batch norm's results: with them new statistics leave the step) lives until a unit that reads it has been
        made again."""
        read = [value for value in results(producer) if value in unit.all_input_nodes]
        if not read:
            return
        num_bytes = sum(v.meta["val"].numel() * v.meta["val"].element_size() for v in read)
        pieces = np.array([c for c, _ in node.options])
        until = min(self._nodes.needed_by_block[unit] + 1, self._nodes.end)
        again = num_bytes / pieces * is_place(node.options, RECOMPUTE)
        self._nodes.use(node, DEVICE, max(self._pricer.last_use[v] for v in read), until, again)
