"""Prices of places of parameters and optimizer state: one node per trained parameter that is large enough (see `price_places`).

Its options are (size class, `StatePlace`). The size class has the pieces of what is stored and of what the update works on, and with
micro-batches those of the sum of gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from torch import fx

from ..cost_model.transfers import cpu_add_seconds, cpu_update_seconds
from .layout import num_pieces
from .lower_updates import due_after
from .micro_batches import is_sum, sent_to_sum, update_of_sum
from .overlap import BWD, CPU, FWD, STREAMS
from .place_nodes import FORBIDDEN, LEAST_SHARE, NEVER_FREE, Copies, PlaceNode, PlaceNodes, Saved, Seconds, add_streams, is_place
from .place_recipes import PlaceRestriction
from .residency import DEVICE, HOST, ON_DEVICE, RECOMPUTE, SMALL_BYTES, StatePlace
from .rule import tensor_args

# Bits of a size class: pieces of what the update works on, of what is stored, of a sum over micro-batches.
_UPDATE, _STORED, _SUM, _MASK = 0, 20, 40, (1 << 20) - 1


class ParameterPlaces:
    """of: parameters with a node, and their updates. sums: those whose gradient is summed over micro-batches, for the update alone.
    gradient_end: positions behind which gradients are no longer needed."""

    def __init__(self, nodes: PlaceNodes) -> None:
        self._nodes, self._pricer, self._graph, self._uses, self._order = nodes, nodes.pricer, nodes.graph, nodes.uses, nodes.order
        self.of = dict(self._large_parameters())
        sums = {param: tensor_args(op)[1] for param, op in self.of.items()}
        self.sums = {param: total for param, total in sums.items() if is_sum(total) and update_of_sum(total) is not None}
        self._due = {op: self._order[node] for node, ops in due_after(self._uses, {}).items() for op in ops}
        self.gradient_end = {tensor_args(op)[1]: at + 1 for op, at in self._due.items()}
        self._last_bwd = max((self._order[op] for op in self._graph.step.ops if op.meta["op"].phase != "update"), default=0) + 1

    def add(self, allowed: PlaceRestriction) -> None:
        """Add all nodes, edges and memory."""
        self._allowed = allowed
        for param, op in self.of.items():
            self._param(param, op)
            if param in self._uses.casts:
                self._fetched_again(param, self._uses.casts[param])

    def _large_parameters(self) -> list[tuple[fx.Node, fx.Node]]:
        found = list(self._uses.parameters())
        sizes = [p.meta["val"].numel() for p, _ in found]
        least = LEAST_SHARE * sum(sizes)
        return [pair for pair, size in zip(found, sizes, strict=True) if size >= least and size * 4 >= SMALL_BYTES]

    def _state_places(self, cast: bool) -> list[StatePlace]:
        """cast: whether the parameter is read in a narrower type."""
        out = [ON_DEVICE]
        for tier in self._nodes.tiers:
            out += [StatePlace(DEVICE, tier, DEVICE), StatePlace(tier, tier, DEVICE, cast=cast and tier == HOST)]
        if HOST in self._nodes.tiers and self._nodes.cluster.device.kind != "cpu":
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
        sizes, places = [sum(parts) for parts in itertools.product(*classes)], self._state_places(param in self._uses.casts)
        options = [(c, pl) for c in sizes for pl in places if pl.update == DEVICE or c >> _STORED & _MASK == c & _MASK]
        num_elements = param.meta["val"].numel()
        p_bytes = num_elements * param.meta["val"].element_size() / _pieces(options, _STORED)
        share = _pieces(options, _UPDATE)
        s_bytes = sum(v.meta["val"].numel() * v.meta["val"].element_size() for v in tensor_args(op)[2:]) / share
        seconds, exposed = self._state_seconds(op, options, p_bytes, s_bytes, num_elements / share)
        at_s = {FWD: self._read_after_s(param), BWD: float(self._nodes.clock[self._due.get(op, self._last_bwd)])}
        node = self._nodes.add(param, options, seconds, at_s, exposed, self._saved(param, op, options))
        for choice, pieces, shift in ties:
            fits = pieces[:, None] == _pieces(options, shift)[None, :]
            cost = np.where(fits, 0.0, FORBIDDEN)
            if choice is update:
                saved = self._pricer.op_costs[update.index][:, None] * np.array([pl.update == HOST for _, pl in options])[None, :]
                cost = cost - saved
            if np.any(cost):
                self._nodes.edge(choice, node, cost, {})
        self._state_memory(param, op, node, p_bytes, s_bytes)
        if param in self.sums:
            g_bytes, on_host = num_elements * param.meta["val"].element_size() / _pieces(options, _SUM), _summed_on_host(options)
            self._nodes.use(node, DEVICE, 0, self._nodes.end, g_bytes * ~on_host)
            self._nodes.use(node, HOST, 0, self._nodes.end, g_bytes * on_host)

    def _saved(self, param: fx.Node, op: fx.Node, options: list) -> Saved:
        """What is not computed: a parameter that is fetched in its narrow form is not cast (but on its way back, where the device updates
        it), and a gradient that is sent in that is not either. All are in the layout in which the parameter is stored."""
        cast, pieces = self._uses.casts.get(param), _pieces(options, _STORED)
        fetched, on_cpu = np.array([pl.cast for _, pl in options]), np.array([pl.update == HOST for _, pl in options])
        if cast is None or not fetched.any():
            return {}
        casting = self._run_s(cast, pieces)
        narrowing = self._run_s(tensor_args(op)[1], pieces) if self._narrow_gradient(op) else 0.0
        return {FWD: casting * fetched, BWD: fetched * np.where(on_cpu, narrowing, -casting / self._nodes.num_runs)}

    def _run_s(self, op: fx.Node, pieces: np.ndarray) -> np.ndarray:
        """float64[pieces]: seconds per step of an op on so many pieces of its operand; none where it has no such layout."""
        choice = self._graph.op_choice[op]
        seconds = self._pricer.op_seconds[choice.index]
        cut = np.array([num_pieces(s.operands[0], self._graph.mesh) for s in choice.options])
        return self._nodes.num_runs * np.array([seconds[cut == n].min() if (cut == n).any() else 0.0 for n in pieces])

    def _state_seconds(
        self, op: fx.Node, options: list, p_bytes: np.ndarray, s_bytes: np.ndarray, num_elements: np.ndarray
    ) -> tuple[Seconds, np.ndarray | float]:
        """(seconds per option, seconds that nothing hides): parameters come in for every forward and backward pass, and once more for a
        late update; where they are cast for their readers, fetches for the backward pass are in an edge (`_fetched_again`). Behind several
        micro-batches there is no computation left to hide anything; streams run side by side. Behind the last of one batch's gradients
        there is little: what has to follow on a gradient, and takes longer than the computation that is left, is exposed."""
        during = Seconds()
        behind = during if self._nodes.num_runs == 1 else Seconds()
        summed_on_host = _summed_on_host(options)
        narrow = self._narrow_share(tensor_args(op)[0], [pl for _, pl in options])
        is_cast = tensor_args(op)[0] in self._uses.casts
        deferrable = self._narrow_gradient(op) and (narrow < 1)
        # Seconds of what comes behind the gradient: before the step ends, and before the next one reads the parameter.
        follows, deferred = np.zeros(len(options)), np.zeros(len(options))
        for tier in self._nodes.tiers:
            p_off = np.array([pl.param == tier for _, pl in options])
            s_off = np.array([pl.state == tier and pl.update == DEVICE for _, pl in options])
            on_cpu = np.array([pl.update == tier for _, pl in options])
            fetched = self._nodes.copy_s(tier, "in", p_bytes * narrow * p_off)
            whole = self._nodes.copy_s(tier, "in", p_bytes * p_off)
            returned = self._nodes.copy_s(tier, "out", p_bytes * p_off * ~on_cpu)
            returned += self._nodes.copy_s(tier, "out", p_bytes * narrow * (narrow < 1) * p_off * ~on_cpu)
            gradient = self._nodes.copy_s(tier, "out", p_bytes * np.where(deferrable, narrow, 1.0) * on_cpu)
            part = self._nodes.copy_s(tier, "out", p_bytes * self._sent_share(op) * on_cpu)
            during.add(STREAMS[tier, "in"], FWD, self._nodes.num_runs * fetched)
            for_bwd = np.where(on_cpu, 0.0 if is_cast else fetched, whole if op in self._due else fetched)
            during.add(STREAMS[tier, "in"], BWD, self._nodes.num_runs * for_bwd)
            during.add(STREAMS[tier, "out"], BWD, self._nodes.num_runs * part * summed_on_host)
            moments = self._nodes.copy_s(tier, "in", s_bytes * s_off)
            behind.add(STREAMS[tier, "in"], BWD, (op not in self._due) * whole * ~on_cpu + moments)
            behind.add(STREAMS[tier, "out"], BWD, self._nodes.copy_s(tier, "out", s_bytes * s_off) + gradient * ~summed_on_host)
            behind.add(STREAMS[tier, "out"], BWD, returned)
            if on_cpu.any():
                adding = (self._nodes.num_runs - 1) * cpu_add_seconds(1.0, self._nodes.cluster) * p_bytes * summed_on_host
                updating = np.where(on_cpu, [cpu_update_seconds(float(n), self._nodes.cluster) for n in num_elements], 0.0)
                for phase, share in (("", 1.0), (BWD, np.where(deferrable, 0.0, 1.0))):
                    during.add(CPU, phase, adding * share)
                    behind.add(CPU, phase, updating * share)
                follows += np.where(deferrable, 0.0, updating)
                deferred += np.where(deferrable, gradient + updating + fetched, 0.0)
            follows += gradient + self._nodes.copy_s(tier, "out", s_bytes * s_off) + returned
        if behind is during:
            left_s = self._left_s(op)
            return during, np.max([0.0 * p_bytes, follows - left_s, deferred - left_s - self._read_after_s(tensor_args(op)[0])], axis=0)
        return during, np.max([0.0 * p_bytes, *behind.of.values()], axis=0)

    def _left_s(self, op: fx.Node) -> float:
        """Seconds of computation behind the gradient of an update."""
        return float(self._nodes.clock[self._last_bwd] - self._nodes.clock[self._due[op]]) if op in self._due else 0.0

    def _read_after_s(self, param: fx.Node) -> float:
        """Seconds of computation before the step reads a parameter."""
        return float(self._nodes.clock[min((self._order[op] for op in self._uses.readers_of_inputs.get(param, [])), default=0)])

    def _narrow_share(self, param: fx.Node, places: Sequence[StatePlace]) -> np.ndarray:
        """Per place the share of a parameter's bytes that is fetched: less than 1 where that is its narrow form."""
        cast = self._uses.casts.get(param)
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
        return math.prod(self._graph.mesh) == 1 and self._uses.narrow_gradient(op) is not None

    def _fetched_again(self, param: fx.Node, cast: fx.Node) -> None:
        """An edge: the narrow form of a parameter, thrown away behind the forward pass, is fetched again for the backward pass, or the
        parameter to make it from where the CPU updates that."""
        node, unit = self._nodes.of[param], self._nodes.of.get(cast)
        places: list[StatePlace] = [place for _, place in node.options if isinstance(place, StatePlace)]
        fetched = np.array([place.update == HOST for place in places])
        if unit is None or not fetched.any():
            return
        wide = param.meta["val"].numel() * param.meta["val"].element_size() / _pieces(node.options, _STORED)
        num_bytes = wide * self._narrow_share(param, places) * fetched
        seconds = Seconds()
        again = self._nodes.num_runs * is_place(unit.options, RECOMPUTE)[:, None]
        copied = again * self._nodes.copy_s(HOST, "in", num_bytes)[None, :]
        seconds.add(STREAMS[HOST, "in"], BWD, copied)
        at_s = float(self._nodes.clock[self._nodes.needed_by_block[cast]])
        self._nodes.copies.append(Copies(node.index, STREAMS[HOST, "in"], at_s, copied, unit.index))
        narrow = np.array([place.cast and place.update == HOST for place in places])
        saved = again * (narrow * self._run_s(cast, _pieces(node.options, _STORED)) / self._nodes.num_runs)[None, :]
        costs = NEVER_FREE * copied - self._pricer.cost_of(saved)
        streams = self._nodes.overlap.of(seconds.of)
        add_streams(streams, self._pricer.hidden_behind(-saved, BWD))
        self._pricer.builder.add_edge(unit.index, node.index, costs, streams)

    def _state_memory(self, param: fx.Node, op: fx.Node, node: PlaceNode, p_bytes: np.ndarray, s_bytes: np.ndarray) -> None:
        places: list[StatePlace] = [place for _, place in node.options if isinstance(place, StatePlace)]
        at = self._due.get(op, self._order[op])
        narrow = self._narrow_share(param, places)
        self._nodes.use(node, DEVICE, 0, self._nodes.end, p_bytes * np.array([pl.param == DEVICE for pl in places]))
        self._nodes.use(node, DEVICE, 0, self._nodes.end, s_bytes * np.array([pl.state == DEVICE for pl in places]))
        self._nodes.use(node, DEVICE, at, at + 1, s_bytes * np.array([pl.state != DEVICE and pl.update == DEVICE for pl in places]))
        for tier in self._nodes.tiers:
            p_off = p_bytes * np.array([pl.param == tier for pl in places])
            s_off = s_bytes * np.array([pl.state == tier for pl in places])
            self._nodes.use(node, tier, 0, self._nodes.end, p_off * np.where(narrow < 1, 1 + narrow, 1.0) + s_off)
            back = self._nodes.ahead_s(tier, "in", p_bytes)
            on_device = np.array([pl.update == DEVICE for pl in places])
            for phase, start, end in self._windows(param, self._due.get(op)):
                whole = p_off * ((narrow == 1) | (on_device & (phase == BWD)))
                self._nodes.use(node, DEVICE, self._nodes.before(start, back), end, whole)
            if op not in self._due:
                self._nodes.use(node, DEVICE, at, at + 1, p_off * on_device)
            for start in self._narrow_needs(param):  # the unit's memory begins there
                self._nodes.use(node, DEVICE, self._nodes.before(start, back), start, p_off * narrow * (narrow < 1))

    def _narrow_needs(self, param: fx.Node) -> list[int]:
        """Positions at which the narrow form of a parameter is there, per phase."""
        cast = self._uses.casts.get(param)
        return [] if cast is None or cast not in self._nodes.of else [self._order[cast], self._nodes.needed_by_block[cast]]

    def _windows(self, param: fx.Node, update_at: int | None) -> list[tuple[str, int, int]]:
        """(phase, positions between which a parameter is there whole): forward, and backward with an early update."""
        out = []
        users = self._uses.readers_of_inputs.get(param, [])
        for phase in (FWD, BWD):
            at = [self._order[op] for op in users if op.meta["op"].phase == phase]
            if at:
                end = max(at) + 1
                if phase == BWD and update_at is not None:
                    end = max(end, update_at + 1)
                out.append((phase, min(at), end))
            elif phase == BWD and update_at is not None:
                out.append((phase, update_at, update_at + 1))  # read by its cast alone, which is kept or made again before
        return out


def _pieces(options: Sequence[tuple[int, object]], shift: int) -> np.ndarray:
    """int[options]: number of pieces, of the part of the size class that begins at a bit."""
    return np.array([c >> shift & _MASK for c, _ in options])


def _summed_on_host(options: Sequence[tuple[int, StatePlace]]) -> np.ndarray:
    """bool[options]: whether micro-batches add up on the host: the CPU updates, and what one of them adds is what the update takes."""
    return np.array([pl.update == HOST and c >> _SUM & _MASK == c & _MASK for c, pl in options])
