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

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from ..cost_model.cluster import Cluster
from ..cost_model.transfers import cpu_add_seconds, cpu_update_seconds, transfer_coefficients
from .choices import Choice
from .layout import num_pieces
from .lower_updates import due_after
from .micro_batches import is_sum, sent_to_sum, update_of_sum
from .overlap import BWD, CPU, FWD, STREAMS
from .place_recipes import AUTO, DROP, place_restriction
from .residency import DEVICE, DISK, HOST, KEEP, ON_DEVICE, RECOMPUTE, SMALL_BYTES, StatePlace, Uses, results
from .rule import tensor_args

if TYPE_CHECKING:
    from .pricing import Pricer

_FORBIDDEN = float("inf")
_LEAST_SHARE = 1e-4  # what is smaller than this share of all is not worth a decision: it stays on the device
# Bits of a size class: pieces of what the update works on, of what is stored, of a sum over micro-batches.
_UPDATE, _STORED, _SUM, _MASK = 0, 20, 40, (1 << 20) - 1
_NEVER_FREE = 0.01  # share of a hidden copy's seconds that counts all the same: of plans that hide all they move, the one that moves least

DIRECTIONS = {
    (HOST, "out"): "device_to_host", (HOST, "in"): "host_to_device", (DISK, "out"): "host_to_disk", (DISK, "in"): "disk_to_host",
}  # fmt: skip


@dataclass(slots=True)
class _Seconds:
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


class PlacePricer:
    """Adds the nodes of places to a pricer's problem. `units` and `params` have them from `__init__` on, so that the pricer leaves their
    memory to them."""

    def __init__(self, pricer: Pricer, tiers: Sequence[str], recipe: str = AUTO) -> None:
        """tiers: pools beside the device's. recipe: see `place_recipes`."""
        self._pricer = pricer
        self._graph = pricer.graph
        self._cluster: Cluster = pricer.cluster
        self._overlap = pricer.overlap
        self._tiers = tuple(tiers)
        self._recipe = recipe
        self.uses = Uses(pricer.graph.step)
        self._order = self.uses.order
        self._end = len(self._order)
        self._num_runs = pricer.num_runs("bwd")  # of what happens in forward and backward passes
        self.units = self._worth_deciding()
        self.params = dict(self._large_parameters())
        # Parameters whose gradient is summed over micro-batches, for their update alone.
        sums = {param: tensor_args(op)[1] for param, op in self.params.items()}
        self.sums = {param: total for param, total in sums.items() if is_sum(total) and update_of_sum(total) is not None}
        self.due = {op: self._order[node] for node, ops in due_after(self.uses, {}).items() for op in ops}
        self.gradient_end = {tensor_args(op)[1]: at + 1 for op, at in self.due.items()}
        self._nodes: dict[fx.Node, PlaceNode] = {}
        self._between: dict[tuple[int, bytes], int] = {}  # (choice, which options are alike) → node
        self._casts = set(self.uses.casts.values())

    # -- what is decided --------------------------------------------------------------------------------------------------

    def _worth_deciding(self) -> dict[fx.Node, int]:
        """Units that get a node, with their global bytes."""
        uses = self.uses
        sizes = {u: sum(v.meta["val"].numel() * v.meta["val"].element_size() for v in results(u)) for u in uses.units}
        least = max(SMALL_BYTES, _LEAST_SHARE * sum(sizes.values()))
        wanted = {u for u in uses.units if uses.later[u]}
        for unit in reversed(uses.units):  # what others may be made from again
            if unit in wanted:
                wanted.update(p for p in uses.producers[unit] if uses.segment[p] == uses.segment[unit])
        return {u: sizes[u] for u in uses.units if u in wanted and sizes[u] >= least and u not in uses.outputs}

    def _large_parameters(self) -> list[tuple[fx.Node, fx.Node]]:
        found = list(self.uses.parameters())
        sizes = [p.meta["val"].numel() for p, _ in found]
        least = _LEAST_SHARE * sum(sizes)
        return [pair for pair, size in zip(found, sizes, strict=True) if size >= least and size * 4 >= SMALL_BYTES]

    # -- nodes ------------------------------------------------------------------------------------------------------------

    def add(self) -> list[PlaceNode]:
        """Add all nodes, edges and memory; called once the choices have theirs."""
        self._clock = self._running_seconds()
        self._last_bwd = max((self._order[op] for op in self._graph.step.ops if op.meta["op"].phase != "update"), default=0) + 1
        self._allowed = place_restriction(self._recipe, self.uses, self.units, self._seconds_of, self._tiers)
        self._needed, self._needed_by_block = self._first_needs()
        for unit, num_bytes in self.units.items():
            self._unit(unit, num_bytes)
        for unit in self.units:
            self._chain(unit)
        for param, op in self.params.items():
            self._param(param, op)
            if param in self.uses.casts:
                self._fetched_again(param, self.uses.casts[param])
        return list(self._nodes.values())

    def _running_seconds(self) -> np.ndarray:
        """float64[nodes + 1]: seconds of computation before each position, every op at its fastest."""
        seconds = np.zeros(self._end + 1)
        for node, at in self._order.items():
            choice = self._graph.op_choice.get(node)
            if choice is not None:
                seconds[at + 1] = float(self._pricer.op_seconds[choice.index].min())
        return np.cumsum(seconds)

    def _seconds_of(self, unit: fx.Node) -> float:
        """An op at its fastest."""
        at = self._order[unit]
        return float(self._clock[at + 1] - self._clock[at])

    def _at(self, seconds: float) -> int:
        """The position at which the computation has taken so long."""
        return min(max(bisect_left(self._clock, seconds) - 1, 0), self._end)

    def _before(self, position: int, seconds: float) -> int:
        """The position so many seconds of computation before another, which itself it is for none."""
        return min(position, self._at(self._clock[position] - seconds)) if seconds else position

    def _first_needs(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """Unit → the first position behind the forward pass where it is needed: by whoever, and by its own block or directly."""
        anyone: dict[fx.Node, int] = {}
        own: dict[fx.Node, int] = {}
        uses = self.uses
        for unit in reversed(uses.units):
            direct = min((self._order[op] for op in uses.later[unit]), default=self._end)
            block = [own[c] for c in uses.consumers[unit] if uses.segment[c] == uses.segment[unit]]
            others = [own[c] for c in uses.consumers[unit] if uses.segment[c] != uses.segment[unit]]
            own[unit] = min([direct, *block])
            anyone[unit] = min([own[unit], *others])
        return anyone, own

    def _copy_s(self, tier: str, way: str, num_bytes: np.ndarray) -> np.ndarray:
        fixed, per_byte = transfer_coefficients(DIRECTIONS[tier, way], self._cluster)
        return np.where(num_bytes > 0, fixed + per_byte * num_bytes, 0.0)

    def _ahead_s(self, tier: str, way: str, num_bytes: np.ndarray) -> float:
        """Seconds that a copy has its memory on the device beside the computation: those it takes, none without prefetching."""
        return float(self._copy_s(tier, way, num_bytes).max()) if self._pricer.prefetch else 0.0

    def _tie(self, unit: fx.Node) -> Choice:
        """The choice whose layout says how large a unit's results are."""
        largest = max(results(unit), key=lambda v: v.meta["val"].numel())
        return self._graph.kept.get(largest, self._graph.op_choice[unit])

    def _unit(self, unit: fx.Node, num_bytes: int) -> None:
        tie, op = self._tie(unit), self._graph.op_choice[unit]
        layouts = tie.options if tie is not op else [s.results[0] or next(r for r in s.results if r is not None) for s in tie.options]
        pieces = np.array([num_pieces(layout, self._graph.mesh) for layout in layouts])
        classes = sorted(set(pieces.tolist()))
        places = [KEEP, RECOMPUTE] if self.uses.later[unit] else [DROP, RECOMPUTE, KEEP]
        if self.uses.later[unit] and unit not in self._casts:
            places += self._tiers
        places = self._allowed.of_unit(unit, places)
        options = [(c, place) for c in classes for place in places]
        local = np.array([num_bytes / c for c, _ in options])
        seconds = _Seconds()
        for tier in self._tiers:
            for way, phase in (("out", FWD), ("in", BWD)):
                moved = np.where(_is(options, tier), self._num_runs * self._copy_s(tier, way, local), 0.0)
                seconds.add(STREAMS[tier, way], phase, moved)
        node = self._add(unit, options, seconds)
        self._tie_sizes(tie, pieces, node, op, recomputed=True)
        if tie is not op:
            self._tie_sizes(op, None, node, op, recomputed=True)
        self._unit_memory(unit, node, local)

    def _add(self, member: fx.Node, options: list, seconds: _Seconds, exposed: np.ndarray | float = 0.0) -> PlaceNode:
        """exposed: seconds that count in full."""
        costs = np.zeros(len(options)) + exposed + sum(_NEVER_FREE * each for each in seconds.of.values())
        index = self._pricer.builder.add_node(costs, self._overlap.of(seconds.of) or None)
        node = self._nodes[member] = PlaceNode(index, member, options)
        return node

    def _tie_sizes(self, choice: Choice, pieces: np.ndarray | None, node: PlaceNode, op: Choice, *, recomputed: bool) -> None:
        """An edge: the size class must be that of the chosen layout, and an op that runs again costs its seconds again."""
        cost = np.zeros((len(choice.options), len(node.options)))
        streams = None
        if recomputed and choice is op:
            again = self._num_runs * _is(node.options, RECOMPUTE)[None, :]
            cost += self._pricer.op_costs[op.index][:, None] * again
            streams = self._pricer.hidden_behind(self._pricer.op_seconds[op.index][:, None] * again, BWD)
        if pieces is not None:
            fits = pieces[:, None] == np.array([c for c, _ in node.options])[None, :]
            cost = np.where(fits, cost, _FORBIDDEN)
        if np.any(cost):
            self._edge(choice, node, cost, streams or {})

    def _edge(self, choice: Choice, node: PlaceNode, cost: np.ndarray, streams: dict[str, np.ndarray]) -> None:
        """An edge between a choice and a place. Options of the choice that mean the same to the place stand behind one option of a node
        between the two, which the places of all equal layers share: a quarter of the entries, and less."""
        lines, group = np.unique(np.hstack([cost, *streams.values()]), axis=0, return_inverse=True)
        if 2 * len(lines) > len(cost):
            self._pricer.builder.add_edge(choice.index, node.index, cost, streams)
            return
        key = choice.index, group.tobytes()
        if key not in self._between:
            self._between[key] = self._pricer.builder.add_node(np.zeros(len(lines)))
            belongs = group[:, None] == np.arange(len(lines))[None, :]
            self._pricer.builder.add_edge(choice.index, self._between[key], np.where(belongs, 0.0, _FORBIDDEN))
        parts = np.hsplit(lines, 1 + len(streams))
        self._pricer.builder.add_edge(self._between[key], node.index, parts[0], dict(zip(streams, parts[1:], strict=True)))

    def _unit_memory(self, unit: fx.Node, node: PlaceNode, local: np.ndarray) -> None:
        uses, order = self.uses, self._order
        made, read = order[unit], order[uses.last_fwd[unit]] + 1
        need = self._needed[unit] if self._pricer.prefetch else self._read_again(unit)
        end = max([order[op] + 1 for op in uses.later[unit]] + [self._needed_by_block[c] + 1 for c in uses.consumers[unit]], default=read)
        end = min(end, self._end)
        again = min(self._needed_by_block[unit], end)
        self._use(node, DEVICE, made, max(read, end), local * _is(node.options, KEEP))
        self._use(node, DEVICE, made, read, local * (_is(node.options, RECOMPUTE) | _is(node.options, DROP)))
        self._use(node, DEVICE, again, end, local * _is(node.options, RECOMPUTE))
        for tier in self._tiers:
            chosen = local * _is(node.options, tier)
            if not chosen.any():
                continue
            out = self._ahead_s(tier, "out", local)
            back = self._ahead_s(tier, "in", local)
            gone = max(read + 1, self._at(self._clock[read] + out))
            start = min(need, max(self._before(need, back), gone))
            self._use(node, DEVICE, made, gone, chosen)
            self._use(node, DEVICE, max(start, gone), end, chosen)
            self._use(node, tier, made, end, chosen)

    def _read_again(self, unit: fx.Node) -> int:
        """The first position behind the forward pass where an op reads a unit's results for itself."""
        return min((self._order[op] for op in self.uses.later[unit]), default=self._end)

    def _use(self, node: PlaceNode, pool: str, start: int, end: int, num_bytes: np.ndarray) -> None:
        if end > start and num_bytes.any():
            self._pricer.builder.add_usage(node.index, pool, start, end, num_bytes)

    def _chain(self, unit: fx.Node) -> None:
        """What a unit that is made again reads must be there."""
        node = self._nodes[unit]
        for producer in self.uses.producers[unit]:
            other = self._nodes.get(producer)
            if other is None:
                self._operand_memory(unit, node, producer)
                continue
            missing = _is(other.options, DROP)
            if self.uses.segment[producer] != self.uses.segment[unit]:
                missing = missing | _is(other.options, RECOMPUTE)
            if not self._pricer.prefetch and self._needed_by_block[unit] < self._read_again(producer):
                # Not back yet: here a copy is back where it is read, and only there.
                missing = missing | np.logical_or.reduce([_is(other.options, tier) for tier in self._tiers])
            bad = missing[:, None] & _is(node.options, RECOMPUTE)[None, :]
            if bad.any():
                self._pricer.builder.add_edge(other.index, node.index, np.where(bad, _FORBIDDEN, 0.0))

    def _operand_memory(self, unit: fx.Node, node: PlaceNode, producer: fx.Node) -> None:
        """What is always kept (batch norm's results: with them new statistics leave the step) lives until a unit that reads it has been
        made again."""
        read = [value for value in results(producer) if value in unit.all_input_nodes]
        if not read:
            return
        num_bytes = sum(v.meta["val"].numel() * v.meta["val"].element_size() for v in read)
        pieces = np.array([c for c, _ in node.options])
        until = min(self._needed_by_block[unit] + 1, self._end)
        self._use(node, DEVICE, max(self._pricer.last_use[v] for v in read), until, num_bytes / pieces * _is(node.options, RECOMPUTE))

    # -- parameters and optimizer state -----------------------------------------------------------------------------------

    def _state_places(self, cast: bool) -> list[StatePlace]:
        """cast: whether the parameter is read in a narrower type."""
        out = [ON_DEVICE]
        for tier in self._tiers:
            out += [StatePlace(DEVICE, tier, DEVICE), StatePlace(tier, tier, DEVICE)]
        if HOST in self._tiers and self._cluster.device.kind != "cpu":
            out.append(StatePlace(HOST, HOST, HOST))  # takes less of the host than with a narrow form, and more of the link
            out += [StatePlace(HOST, HOST, HOST, cast=True)] * cast
        return self._allowed.of_state(out)

    def _param(self, param: fx.Node, op: fx.Node) -> None:
        """A parameter with its optimizer state."""
        stored, update = self._graph.input_choice[param], self._graph.op_choice[op]
        p_pieces = np.array([num_pieces(layout, self._graph.mesh) for layout in stored.options])
        s_pieces = np.array([num_pieces(s.operands[0], self._graph.mesh) for s in update.options])
        ties = [(stored, p_pieces, _STORED), (update, s_pieces, _UPDATE)]
        if param in self.sums:
            summing = self._graph.op_choice[self.sums[param]]
            ties.append((summing, np.array([num_pieces(s.results[0], self._graph.mesh) for s in summing.options]), _SUM))
        classes = [[int(n) << shift for n in sorted(set(pieces.tolist()))] for _, pieces, shift in ties]
        # The CPU updates a parameter where it is stored, so in the layout it is stored in.
        sizes, places = [sum(parts) for parts in itertools.product(*classes)], self._state_places(param in self.uses.casts)
        options = [(c, pl) for c in sizes for pl in places if pl.update == DEVICE or c >> _STORED & _MASK == c & _MASK]
        num_elements = param.meta["val"].numel()
        p_bytes = num_elements * param.meta["val"].element_size() / _pieces(options, _STORED)
        share = _pieces(options, _UPDATE)
        s_bytes = sum(v.meta["val"].numel() * v.meta["val"].element_size() for v in tensor_args(op)[2:]) / share
        seconds, exposed = self._state_seconds(op, options, p_bytes, s_bytes, num_elements / share)
        node = self._add(param, options, seconds, exposed)
        for choice, pieces, shift in ties:
            fits = pieces[:, None] == _pieces(options, shift)[None, :]
            cost = np.where(fits, 0.0, _FORBIDDEN)
            if choice is update:
                saved = self._pricer.op_costs[update.index][:, None] * np.array([pl.update == HOST for _, pl in options])[None, :]
                cost = cost - saved
            if np.any(cost):
                self._edge(choice, node, cost, {})
        self._state_memory(param, op, node, p_bytes, s_bytes)
        if param in self.sums:
            g_bytes, on_host = num_elements * param.meta["val"].element_size() / _pieces(options, _SUM), _summed_on_host(options)
            self._use(node, DEVICE, 0, self._end, g_bytes * ~on_host)
            self._use(node, HOST, 0, self._end, g_bytes * on_host)

    def _state_seconds(
        self, op: fx.Node, options: list, p_bytes: np.ndarray, s_bytes: np.ndarray, num_elements: np.ndarray
    ) -> tuple[_Seconds, np.ndarray | float]:
        """(seconds per option, seconds that nothing hides): parameters come in for every forward and backward pass, and once more for a
        late update; where they are cast for their readers, fetches for the backward pass are in an edge (`_fetched_again`). Behind several
        micro-batches there is no computation left to hide anything; streams run side by side. Behind the last of one batch's gradients
        there is little: what has to follow on a gradient, and takes longer than the computation that is left, is exposed."""
        during = _Seconds()
        behind = during if self._num_runs == 1 else _Seconds()
        summed_on_host = _summed_on_host(options)
        narrow = self._narrow_share(tensor_args(op)[0], [pl for _, pl in options])
        is_cast = tensor_args(op)[0] in self.uses.casts
        deferrable = self._narrow_gradient(op) and (narrow < 1)
        follows = np.zeros(len(options))  # seconds of what comes behind the gradient
        for tier in self._tiers:
            p_off = np.array([pl.param == tier for _, pl in options])
            s_off = np.array([pl.state == tier and pl.update == DEVICE for _, pl in options])
            on_cpu = np.array([pl.update == tier for _, pl in options])
            fetched = self._copy_s(tier, "in", p_bytes * narrow * p_off)
            gradient = self._copy_s(tier, "out", p_bytes * np.where(deferrable, narrow, 1.0) * on_cpu)
            part = self._copy_s(tier, "out", p_bytes * self._sent_share(op) * on_cpu)
            during.add(STREAMS[tier, "in"], FWD, self._num_runs * fetched)
            during.add(STREAMS[tier, "in"], BWD, self._num_runs * fetched * ~(on_cpu & is_cast))
            during.add(STREAMS[tier, "out"], BWD, self._num_runs * part * summed_on_host)
            behind.add(STREAMS[tier, "in"], BWD, (op not in self.due) * fetched * ~on_cpu + self._copy_s(tier, "in", s_bytes * s_off))
            behind.add(STREAMS[tier, "out"], BWD, self._copy_s(tier, "out", s_bytes * s_off) + gradient * ~summed_on_host)
            behind.add(STREAMS[tier, "out"], BWD, self._copy_s(tier, "out", p_bytes * p_off * ~on_cpu))
            if on_cpu.any():
                adding = (self._num_runs - 1) * cpu_add_seconds(1.0, self._cluster) * p_bytes * summed_on_host
                updating = np.where(on_cpu, [cpu_update_seconds(float(n), self._cluster) for n in num_elements], 0.0)
                for phase, share in (("", 1.0), (BWD, np.where(deferrable, 0.0, 1.0))):
                    during.add(CPU, phase, adding * share)
                    behind.add(CPU, phase, updating * share)
                follows += np.where(deferrable, 0.0, updating)
            follows += gradient + self._copy_s(tier, "out", s_bytes * s_off + p_bytes * p_off * ~on_cpu)
        if behind is during:
            return during, np.maximum(0.0, follows - self._left_s(op))
        return during, np.max([0.0 * p_bytes, *behind.of.values()], axis=0)

    def _left_s(self, op: fx.Node) -> float:
        """Seconds of computation behind the gradient of an update."""
        return float(self._clock[self._last_bwd] - self._clock[self.due[op]]) if op in self.due else 0.0

    def _narrow_share(self, param: fx.Node, places: Sequence[StatePlace]) -> np.ndarray:
        """Per place the share of a parameter's bytes that is fetched: less than 1 where that is its narrow form."""
        cast = self.uses.casts.get(param)
        share = 1.0 if cast is None else cast.meta["val"].element_size() / param.meta["val"].element_size()
        return np.array([share if place.cast else 1.0 for place in places])

    def _sent_share(self, op: fx.Node) -> float:
        """The share of a gradient's bytes that each micro-batch sends to a sum on the host (see `_narrow_gradient`)."""
        total = tensor_args(op)[1]
        if not is_sum(total) or math.prod(self._graph.mesh) > 1:
            return 1.0
        return sent_to_sum(total).meta["val"].element_size() / total.meta["val"].element_size()

    def _narrow_gradient(self, op: fx.Node) -> bool:
        """Whether a gradient can be sent to the CPU as the backward pass makes it. On several devices what is summed is the wide one."""
        return math.prod(self._graph.mesh) == 1 and self.uses.narrow_gradient(op) is not None

    def _fetched_again(self, param: fx.Node, cast: fx.Node) -> None:
        """An edge: the narrow form of a parameter, thrown away behind the forward pass, is fetched again for the backward pass, or the
        parameter to make it from where the CPU updates that."""
        node, unit = self._nodes[param], self._nodes.get(cast)
        places: list[StatePlace] = [place for _, place in node.options if isinstance(place, StatePlace)]
        fetched = np.array([place.update == HOST for place in places])
        if unit is None or not fetched.any():
            return
        wide = param.meta["val"].numel() * param.meta["val"].element_size() / _pieces(node.options, _STORED)
        num_bytes = wide * self._narrow_share(param, places) * fetched
        seconds = _Seconds()
        again = self._num_runs * _is(unit.options, RECOMPUTE)[:, None]
        seconds.add(STREAMS[HOST, "in"], BWD, again * self._copy_s(HOST, "in", num_bytes)[None, :])
        costs = _NEVER_FREE * seconds.of[STREAMS[HOST, "in"], BWD]
        self._pricer.builder.add_edge(unit.index, node.index, costs, self._overlap.of(seconds.of))

    def _state_memory(self, param: fx.Node, op: fx.Node, node: PlaceNode, p_bytes: np.ndarray, s_bytes: np.ndarray) -> None:
        places: list[StatePlace] = [place for _, place in node.options if isinstance(place, StatePlace)]
        at = self.due.get(op, self._order[op])
        narrow = self._narrow_share(param, places)
        self._use(node, DEVICE, 0, self._end, p_bytes * np.array([pl.param == DEVICE for pl in places]))
        self._use(node, DEVICE, 0, self._end, s_bytes * np.array([pl.state == DEVICE for pl in places]))
        self._use(node, DEVICE, at, at + 1, s_bytes * np.array([pl.state != DEVICE and pl.update == DEVICE for pl in places]))
        for tier in self._tiers:
            p_off = p_bytes * np.array([pl.param == tier for pl in places])
            s_off = s_bytes * np.array([pl.state == tier for pl in places])
            self._use(node, tier, 0, self._end, p_off * np.where(narrow < 1, 1 + narrow, 1.0) + s_off)
            back = self._ahead_s(tier, "in", p_bytes)
            for start, end in self._windows(param, self.due.get(op)):
                self._use(node, DEVICE, self._before(start, back), end, p_off * (narrow == 1))
            if op not in self.due:
                self._use(node, DEVICE, at, at + 1, p_off * np.array([pl.update == DEVICE for pl in places]))
            for start in self._narrow_needs(param):  # the unit's memory begins there
                self._use(node, DEVICE, self._before(start, back), start, p_off * narrow * (narrow < 1))

    def _narrow_needs(self, param: fx.Node) -> list[int]:
        """Positions at which the narrow form of a parameter is there, per phase."""
        cast = self.uses.casts.get(param)
        return [self._order[cast], self._needed_by_block[cast]] if cast in self._nodes else []  # type: ignore[index]

    def _windows(self, param: fx.Node, update_at: int | None) -> list[tuple[int, int]]:
        """Positions between which a parameter is there, per phase: forward, and backward with an early update."""
        out = []
        users = self.uses.readers_of_inputs.get(param, [])
        for phase in ("fwd", "bwd"):
            at = [self._order[op] for op in users if op.meta["op"].phase == phase]
            if at:
                end = max(at) + 1
                if phase == "bwd" and update_at is not None:
                    end = max(end, update_at + 1)
                out.append((min(at), end))
            elif phase == "bwd" and update_at is not None:
                out.append((update_at, update_at + 1))  # read by its cast alone, which is kept or made again before
        return out


def _is(options: Sequence[tuple[int, object]], place: str) -> np.ndarray:
    """bool[options]: those of a place."""
    return np.array([p == place for _, p in options])


def _pieces(options: Sequence[tuple[int, object]], shift: int) -> np.ndarray:
    """int[options]: number of pieces, of the part of the size class that begins at a bit."""
    return np.array([c >> shift & _MASK for c, _ in options])


def _summed_on_host(options: Sequence[tuple[int, StatePlace]]) -> np.ndarray:
    """bool[options]: whether micro-batches add up on the host: the CPU updates, and what one of them adds is what the update takes."""
    return np.array([pl.update == HOST and c >> _SUM & _MASK == c & _MASK for c, pl in options])
