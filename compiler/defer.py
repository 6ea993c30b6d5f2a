"""Which updates on the CPU run beside the next step's forward pass, so that the CPU has work all the time.

Gradients come in the backward pass, those of the last layers first; the parameters of the first layers are needed first. The CPU takes the
newest gradient there is, the one whose parameter is needed soonest. What it has not come to when the step ends is deferred: its gradient
waits on the host, and the next step begins with it, in the order in which the forward pass reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..cost_model.cluster import Cluster
from ..cost_model.simulate import COMPUTE, Simulation
from ..cost_model.transfers import cpu_update_seconds
from ..runtime import tiers
from ..runtime.program import LocalProgram
from .timeline import Timeline
from .timeline_tiers import WAIT


@dataclass(frozen=True, slots=True)
class _Update:
    """Of one parameter, or of several whose update cannot wait (name ""). released_s: when the gradients have left the device."""

    name: str
    released_s: float
    seconds: float


def deferrable(program: LocalProgram, line: Timeline, cluster: Cluster, step_s: float) -> frozenset[str]:
    """Placeholders of the parameters whose update is better deferred. line: the program's timeline. step_s: what the step is expected to
    take; where that is more than it computes, everything in it is taken to be so much later."""
    updates, computing_s = _updates(program, line, cluster)
    late = max(1.0, step_s / computing_s) if computing_s else 1.0
    updates, step_s = [replace(update, released_s=late * update.released_s) for update in updates], late * computing_s
    deferred: frozenset[str] = frozenset()
    for _ in range(2):  # the second time knowing what the CPU begins with
        before = sum(update.seconds for update in updates if update.name in deferred)
        deferred = _left(updates, before, step_s)
    return deferred


def waited_for(program: LocalProgram, line: Timeline, simulation: Simulation, least_s: float) -> list[frozenset[str]]:
    """Placeholders of the parameters whose update the CPU ends behind the last computation, and that can be deferred: those of one call
    together, the longest first. None where the step ends no more than least_s behind that."""
    items = {item.name: (item.seconds, float(end)) for item, end in zip(line.instructions, simulation.end_s, strict=True)}
    last_s = max((items[item.name][1] for item in line.instructions if item.stream == COMPUTE and item.op_class != WAIT), default=math.inf)
    if simulation.step_time_s - last_s <= least_s:
        return []
    late = [node for node in program.graph.nodes if node.target is tiers.host_update and items[node.name][1] > last_s]
    late.sort(key=lambda node: -items[node.name][0])
    found = [
        frozenset(p.name for p, grad in zip(node.args[0], node.args[1], strict=True) if grad.target is tiers.send_gradient) for node in late
    ]
    return [names for names in found if names]


def _updates(program: LocalProgram, line: Timeline, cluster: Cluster) -> tuple[list[_Update], float]:
    """Updates in the order of their gradients, and the seconds of computation."""
    seconds = {item.name: item.seconds for item in line.instructions if item.stream == COMPUTE}
    elements = {port.name: math.prod(port.spec.local_shape()) for port in program.inputs if port.spec is not None}
    now, out = 0.0, []
    for node in program.graph.nodes:
        now += seconds.get(node.name, 0.0)
        if node.target is tiers.send_gradient:
            out.append(_Update(node.args[0].name, now, cpu_update_seconds(elements[node.args[0].name], cluster)))
        elif node.target is tiers.host_update:
            wide = [p for p, grad in zip(node.args[0], node.args[1], strict=True) if grad.target is not tiers.send_gradient]
            out.append(_Update("", now, cpu_update_seconds(sum(elements[p.name] for p in wide), cluster)))
    return out, now


def _left(updates: list[_Update], busy_until_s: float, step_s: float) -> frozenset[str]:
    """What is not done when the step ends, the newest being done first. Those that cannot wait go before all others."""
    waiting: list[_Update] = []
    now, at = busy_until_s, 0
    while now < step_s:
        while at < len(updates) and updates[at].released_s <= now:
            waiting.append(updates[at])
            at += 1
        if not waiting:
            if at == len(updates):
                break
            now = updates[at].released_s
            continue
        pick = next((i for i, update in enumerate(waiting) if not update.name), len(waiting) - 1)
        if now + waiting[pick].seconds > step_s and waiting[pick].name:
            break
        now += waiting.pop(pick).seconds
    return frozenset(update.name for update in (*waiting, *updates[at:]) if update.name)
