"""Schedule: when copies between tiers and gathers of parameters start and when they are waited for, within the memory there is.

Lowering starts a fetch where its result is needed and waits for a copy where it starts, which is right but hides nothing. Here the starts
move up and the waits down:

- what is copied out is waited for when its stream can be done with it; until then its memory is held;
- what is fetched (or gathered from parameters) starts as late as its stream, working backwards from all the times of need, allows, and so
  no earlier than it must; a gather starts before reductions of gradients that would keep the stream busy when it has to be there;
- neither by more than the memory left at every instruction in between allows.

Times are the running sum of the instructions' predicted seconds, memory is that of the program as lowered. The result is a list of moves,
which is part of the plan: all ranks, and later runs, have the same order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from ..cost_model.cluster import Cluster
from ..cost_model.simulate import COMPUTE, Instruction
from ..runtime import collectives, micro_batches, tiers
from ..runtime.program import LocalProgram
from .lower import Moves
from .timeline import COLLECTIVES, Timeline

_WAITS = (tiers.settle, tiers.updated)
_NUM_QUEUES = 3  # times that the queue of collectives is looked at, and gathers moved before what they would wait for
_GATHERS = (collectives.all_gather, collectives.all_gather_bucket)
# What a gather of a parameter may stand behind: a piece of it, in another type, fetched.
_FETCHES = (tiers.fetch, tiers.fetch_cast)
_FEEDS = (collectives.take_shard, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default, tiers.arrive, *_FETCHES)


@dataclass(slots=True)
class _Scheduler:
    """nodes: the instructions in order. clock: seconds of computation before each. used: bytes on the device during each."""

    nodes: list[fx.Node]
    price: dict[fx.Node, Instruction]
    clock: list[float]
    used: np.ndarray
    limit: float
    held: dict[str, int]
    place: dict[fx.Node, int] = field(default_factory=dict)
    moves: Moves = field(default_factory=list)
    started: dict[fx.Node, str] = field(default_factory=dict)  # a start, or what feeds it, and before what it stands
    fixed: list[bool] = field(default_factory=list)  # instructions that stay where they are: others move to before one of these
    end: int = -1  # of what runs once per micro-batch: nothing moves from one side of it to the other

    def run(self, *, gathers: bool) -> Moves:
        self.place = {node: i for i, node in enumerate(self.nodes)}
        moving = {fed for node in self.nodes if self._is_start(node, gathers) for fed in (node, *_feeders(node))}
        self.fixed = [node.target not in _WAITS and node not in moving for node in self.nodes]
        self.end = next((i for i, node in enumerate(self.nodes) if node.target is micro_batches.end), -1)
        self._waits()
        self._starts(gathers)
        return self.moves

    # -- waits move down --------------------------------------------------------------------------------------------------

    def _waits(self) -> None:
        free: dict[tuple[str, str], float] = {}
        for node in self.nodes:
            if node.target not in _WAITS:
                continue
            start = node.args[0]
            assert isinstance(start, fx.Node), f"{node.name} waits for {start!r}"
            item = self.price[start]
            begin = max(self.clock[self.place[start]], free.get(item.queue, 0.0))
            done = free[item.queue] = begin + item.seconds
            readers = [self.place[user] for user in node.users if user.op != "output"]
            last = min([*readers, self.end if self.place[node] < self.end else len(self.nodes) - 1])
            target = min(bisect_left(self.clock, done), last)
            self._move_down(node, target, self.held.get(start.name, 0))

    def _move_down(self, node: fx.Node, target: int, held: int) -> None:
        """Let a wait stand just before position `target`, or as near as the memory it goes on holding allows."""
        at = self.place[node]
        over = np.flatnonzero(self.used[at:target] + held > self.limit)
        target = at + int(over[0]) if len(over) else target
        while target > at and not self.fixed[target]:
            target -= 1
        if target > at + 1:
            self.used[at:target] += held
            self.place[node] = target
            self.moves.append((node.name, self.nodes[target].name))

    # -- starts move up ---------------------------------------------------------------------------------------------------

    def _starts(self, gathers: bool) -> None:
        starts = [node for node in self.nodes if self._is_start(node, gathers)]
        others = [node for node in self.nodes if node.target in collectives.STARTS and not self._is_start(node, gathers)]
        begins = self._latest(starts, [], {})
        for _ in range(_NUM_QUEUES if others else 0):
            begins = self._latest(starts, others, self._queue(others, begins))
        for node in _by_need(starts):  # where there is too little memory, it goes to what is needed first
            behind = self.end if self.place[node] > self.end else -1
            together = [node, *_feeders(node)]
            needs = (used for item in together for used in item.all_input_nodes if used not in together)
            earliest = max([self.place.get(used, -1) for used in needs] + [behind]) + 1
            # What waits for it may stand earlier than it had to: before a long instruction.
            begin = min(begins[node], min(map(self._clock, node.users)) - self.price[node].seconds)
            target = max(bisect_right(self.clock, begin) - 1, earliest)
            self._move_up(together, target)
        self.moves += [(node.name, before) for node, before in self.started.items()]

    def _latest(self, starts: list[fx.Node], others: list[fx.Node], ends: dict[fx.Node, float]) -> dict[fx.Node, float]:
        """When each has to start, so that it is there when it is needed. A gather goes before each of the other collectives of its lane,
        which are less urgent, that would still be under way. ends: when these are done."""
        begins: dict[fx.Node, float] = {}
        next_start: dict[tuple[str, str], float] = {}
        moved: dict[fx.Node, float] = {}  # what has to be there when a gather starts
        waiting: dict[tuple[str, str], list[fx.Node]] = {}
        for other in others:
            waiting.setdefault(self.price[other].queue, []).append(other)
        for node in reversed(starts):
            item = self.price[node]
            needed = min(moved.get(user, self._clock(user)) for user in node.users)
            begin = min(needed, next_start.get(item.queue, needed)) - item.seconds
            before = waiting.get(item.queue, [])
            while before and self._clock(before[-1]) >= needed:
                before.pop()
            for other in reversed(before):
                if ends[other] <= begin:
                    break
                begin = min(begin, self._clock(other))
            begins[node] = next_start[item.queue] = begin
            moved |= dict.fromkeys(_feeders(node), begin)
        return begins

    def _queue(self, others: list[fx.Node], begins: dict[fx.Node, float]) -> dict[fx.Node, float]:
        """When each of the other collectives is done, in line with the gathers of its lane."""
        gathers = [(begin, -1, node) for node, begin in begins.items() if self.price[node].stream == COLLECTIVES]
        issued = sorted([*gathers, *((self._clock(node), self.place[node], node) for node in others)], key=lambda row: row[:2])
        free: dict[tuple[str, str], float] = {}
        ends: dict[fx.Node, float] = {}
        for at, _, node in issued:
            item = self.price[node]
            ends[node] = free[item.queue] = max(free.get(item.queue, 0.0), at) + item.seconds
        return ends

    def _clock(self, node: fx.Node) -> float:
        return self.clock[self.place[node]]

    def _is_start(self, node: fx.Node, gathers: bool) -> bool:
        if node.target in _FETCHES:
            return True
        return gathers and node.target in _GATHERS and bool(node.users) and all(_is_stored(used) for used in node.all_input_nodes)

    def _move_up(self, together: list[fx.Node], target: int) -> None:
        """Let a start, and what it is fed by (each behind its reader), stand just before position `target`, or as near as memory allows."""
        at = self.place[together[0]]
        num_bytes = sum(buffer.num_bytes for node in together for buffer in self.price[node].allocs)
        over = np.flatnonzero(self.used[target:at] + num_bytes > self.limit)
        target = target + int(over[-1]) + 1 if len(over) else target
        while target < at and not self.fixed[target]:
            target += 1
        if target < at:
            self.used[target:at] += num_bytes
            for node in reversed(together):
                if self.place[node] > target:
                    self.place[node] = target
                    self.started.pop(node, None)  # a fetch that moved with its gather goes on by itself
                    self.started[node] = self.nodes[target].name


def _chain(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """What a value goes through since it was fetched or read, the last first, and where it comes from."""
    passed: list[fx.Node] = []
    while node.op == "call_function" and node.target in _FEEDS:
        passed.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return passed, node


def _is_stored(node: fx.Node) -> bool:
    """Whether a value is there from the beginning of the step: an input, or what is fetched or made of one alone."""
    return _chain(node)[1].op == "placeholder"


def _by_need(starts: list[fx.Node]) -> list[fx.Node]:
    """Starts in the order in which they are needed; a gather, which takes what feeds it along, before that."""
    fed = {node: _feeders(node) for node in starts}
    feeders = set().union(*fed.values())
    order = [passed for node in starts if node not in feeders for passed in (node, *reversed(fed[node]))]
    return [node for node in dict.fromkeys(order) if node in fed]


def _feeders(start: fx.Node) -> list[fx.Node]:
    """What makes the operands of a gather from inputs, behind their readers: it moves with it."""
    return [passed for node in start.all_input_nodes for passed in _chain(node)[0]] if start.target in _GATHERS else []


def schedule(program: LocalProgram, line: Timeline, cluster: Cluster, limit_bytes: float, step_s: float = 0.0) -> Moves:
    """The moves for a program as lowered, with its timeline (see the module docstring). step_s: what the step is expected to take; where
    copies make that more than it computes, all times are so much longer. Nothing is changed."""
    items = {item.name: item for item in line.instructions}
    nodes = [n for n in program.graph.nodes if n.op != "placeholder"]
    price = {n: items[n.name] for n in nodes if n.name in items}
    seconds = [price[n].seconds if n in price and price[n].stream == COMPUTE else 0.0 for n in nodes]
    seconds = (np.array(seconds) * max(1.0, step_s / max(sum(seconds), 1e-12))).tolist()
    clock = np.concatenate([[0.0], np.cumsum(seconds)])[:-1].tolist()
    used = _used_bytes(nodes, price, sum(buffer.num_bytes for buffer in line.resident))
    gathers = cluster.overlap > 0 and any(item.stream == COLLECTIVES for item in line.instructions)
    return _Scheduler(nodes, price, clock, used, limit_bytes, line.held_bytes).run(gathers=gathers)


def _used_bytes(nodes: Sequence[fx.Node], price: dict[fx.Node, Instruction], resident: int) -> np.ndarray:
    """int64[nodes]: bytes on the device while each instruction runs."""
    out = np.zeros(len(nodes), dtype=np.int64)
    sizes: dict[str, int] = {}
    now = resident
    for i, node in enumerate(nodes):
        item = price.get(node)
        if item is not None:
            sizes |= {buffer.name: buffer.num_bytes for buffer in item.allocs}
            now += sum(buffer.num_bytes for buffer in item.allocs)
        out[i] = now
        if item is not None:
            now -= sum(sizes.get(name, 0) for name in item.frees)
    return out
