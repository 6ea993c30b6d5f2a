"""Discrete-event simulation of one step: instructions on streams in, step time, busy and exposed time, memory peaks and a timeline out.

The model, as CUDA streams and worker threads behave:

- Each lane of a stream runs its instructions in list order, one at a time. An instruction starts when its lane is free, all instructions
  it waits for have ended, and the host has issued it; the host issues in list order and needs `launch_s` each.
- Instructions that use a shared resource (a host link, a memory bus, a network card) at the same time slow each other down: where
  the demands on a resource add up to D > 1, everything that uses it runs at 1/D of its speed.
- Micro-batches run one after the other, each when the one before has ended on every stream; one of them is simulated.
- A buffer is allocated when the instruction that names it in `allocs` starts, and freed when the one that names it in `frees` ends.

Without contention one pass in list order is exact; with it, an event loop runs. Both take well under 2 s for 100,000 instructions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

COMPUTE = "compute"

Floats = npt.NDArray[np.float64]


class Buffer(NamedTuple):
    """Bytes of a pool ("device", "host", "disk") under a name that is unique in the program; `owner` groups buffers in reports."""

    name: str
    pool: str
    num_bytes: int
    owner: str = ""


class Instruction(NamedTuple):
    """One thing a stream does. seconds: alone, without contention. waits: indices of earlier instructions.

    uses: (resource, demand) pairs; demand 1 saturates the resource. frees: names of buffers. num_runs: how often it runs in a step: those
    of a micro-batch, which stand before all others, as often as there are micro-batches. lane: a stream may have several, which run beside
    each other (one per process group); it is reported as one.
    """

    name: str
    stream: str
    seconds: float
    waits: tuple[int, ...] = ()
    allocs: tuple[Buffer, ...] = ()
    frees: tuple[str, ...] = ()
    uses: tuple[tuple[str, float], ...] = ()
    op_class: str = ""
    num_runs: int = 1
    lane: str = ""

    @property
    def queue(self) -> tuple[str, str]:
        """What runs one instruction at a time."""
        return self.stream, self.lane


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Most bytes a pool holds, when, and whose they are (owner, bytes), largest first."""

    num_bytes: int
    time_s: float
    owners: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a step is predicted to do. start_s, end_s: per instruction, from the beginning of the last micro-batch on.

    busy_s: per stream, on any lane. exposed_s: per stream other than compute, the time it is busy while compute is not. memory: per pool
    the points (time, bytes) at which its use changes.
    """

    step_time_s: float
    start_s: Floats
    end_s: Floats
    busy_s: dict[str, float]
    exposed_s: dict[str, float]
    peaks: dict[str, Peak]
    memory: dict[str, tuple[Floats, Floats]]


def simulate(
    instructions: Sequence[Instruction], *, resident: Iterable[Buffer] = (), launch_s: float = 0.0, compute: str = COMPUTE
) -> Simulation:
    """Run a program on paper.

    resident: buffers that exist before the step (parameters, optimizer state). launch_s: host seconds per instruction. compute: the
    stream that others are hidden behind. Raises ValueError for a wait that is not on an earlier instruction, a duration that is no
    time, or a buffer that is freed twice or never allocated.
    """
    _check(instructions, launch_s)
    contended = _contended_resources(instructions)
    start, end = _event_loop(instructions, launch_s, contended) if contended else _one_pass(instructions, launch_s)
    peaks, memory = _memory(instructions, tuple(resident), start, end)
    busy, exposed = _streams(instructions, start, end, compute)
    step = float(end.max()) if len(end) else 0.0
    before = _micro_batches_before(instructions, launch_s, compute)
    if before is not None:
        step += before.step_time_s
        busy = {stream: seconds + before.busy_s.get(stream, 0.0) for stream, seconds in busy.items()}
        exposed = {stream: seconds + before.exposed_s.get(stream, 0.0) for stream, seconds in exposed.items()}
    return Simulation(step_time_s=step, start_s=start, end_s=end, busy_s=busy, exposed_s=exposed, peaks=peaks, memory=memory)


def _micro_batches_before(instructions: Sequence[Instruction], launch_s: float, compute: str) -> Simulation | None:
    """All micro-batches but the last; None where there is one batch. Their memory is that of the last one."""
    num_runs = max((item.num_runs for item in instructions), default=1)
    if num_runs == 1:
        return None
    repeated = [item._replace(num_runs=1, allocs=(), frees=()) for item in instructions if item.num_runs > 1]
    one = simulate(repeated, launch_s=launch_s, compute=compute)
    times = num_runs - 1
    return replace(
        one,
        step_time_s=times * one.step_time_s,
        busy_s={stream: times * seconds for stream, seconds in one.busy_s.items()},
        exposed_s={stream: times * seconds for stream, seconds in one.exposed_s.items()},
    )


def _check(instructions: Sequence[Instruction], launch_s: float) -> None:
    if not (math.isfinite(launch_s) and launch_s >= 0):
        raise ValueError(f"launch_s is {launch_s!r}; it must be a finite number of seconds, 0 or more")
    for index, (name, _, seconds, waits, *_) in enumerate(instructions):
        num_runs = instructions[index].num_runs
        if num_runs != 1 and num_runs != instructions[0].num_runs:
            raise ValueError(f"instruction {index} ({name}) runs {num_runs} times; it must be once, or as often as those before it")
        if not (seconds >= 0 and math.isfinite(seconds)):
            raise ValueError(f"instruction {index} ({name}) takes {seconds!r} s; it must be a finite number, 0 or more")
        for wait in waits:
            if not 0 <= wait < index:
                raise ValueError(f"instruction {index} ({name}) waits for {wait}; only earlier ones, 0 to {index - 1}, are possible")


# --- time --------------------------------------------------------------------------------------------------------------------------


def _contended_resources(instructions: Sequence[Instruction]) -> set[str]:
    """Resources that more than one lane uses with demands that can add up to more than 1."""
    demand: dict[str, dict[tuple[str, str], float]] = {}
    for item in instructions:
        for resource, share in item.uses:
            lanes = demand.setdefault(resource, {})
            lanes[item.queue] = max(share, lanes.get(item.queue, 0.0))
    return {resource for resource, lanes in demand.items() if len(lanes) > 1 and sum(lanes.values()) > 1}


def _one_pass(instructions: Sequence[Instruction], launch_s: float) -> tuple[Floats, Floats]:
    """List order is an order in which every start is known: lanes and waits only look back."""
    start, end = [0.0] * len(instructions), [0.0] * len(instructions)
    free: dict[tuple[str, str], float] = {}
    for index, item in enumerate(instructions):
        at = max(free.get(item.queue, 0.0), launch_s * (index + 1) if launch_s else 0.0)
        for wait in item.waits:
            if end[wait] > at:
                at = end[wait]
        start[index] = at
        free[item.queue] = end[index] = at + item.seconds
    return np.array(start), np.array(end)


class _Lanes:
    """The event loop's state: what each lane runs and how much of it is left."""

    def __init__(self, instructions: Sequence[Instruction], launch_s: float, contended: set[str]) -> None:
        self.items = instructions
        self.launch_s = launch_s
        self.uses = [[use for use in item.uses if use[0] in contended] for item in instructions]
        self.queues: dict[tuple[str, str], list[int]] = {}
        self.waiting = [len(item.waits) for item in instructions]
        self.dependents: list[list[int]] = [[] for _ in instructions]
        for index, item in enumerate(instructions):
            self.queues.setdefault(item.queue, []).append(index)
            for wait in item.waits:
                self.dependents[wait].append(index)
        for queue in self.queues.values():
            queue.reverse()  # the next one is at the end
        self.left: dict[int, float] = {}
        self.idle = set(self.queues)
        self.start = np.zeros(len(instructions))
        self.end = np.zeros(len(instructions))

    def start_ready(self, now: float) -> float:
        """Start what can start; returns the time at which the host issues the next one that waits for that only."""
        next_issue = math.inf
        for lane in sorted(self.idle):
            queue = self.queues[lane]
            if not queue or self.waiting[queue[-1]]:
                continue
            issued = self.launch_s * (queue[-1] + 1)
            if issued > now:
                next_issue = min(next_issue, issued)
                continue
            index = queue.pop()
            self.idle.discard(lane)
            self.start[index] = now
            self.left[index] = self.items[index].seconds
        return next_issue

    def rates(self) -> dict[int, float]:
        """Speed of each running instruction, 1 where nothing is in its way."""
        total: dict[str, float] = {}
        for index in self.left:
            for resource, share in self.uses[index]:
                total[resource] = total.get(resource, 0.0) + share
        rates = dict.fromkeys(self.left, 1.0)
        if total and max(total.values()) > 1:
            for index in rates:
                for resource, _ in self.uses[index]:
                    rates[index] = min(rates[index], 1.0 / total[resource])
        return rates

    def finish(self, index: int, now: float) -> None:
        del self.left[index]
        self.end[index] = now
        self.idle.add(self.items[index].queue)
        for dependent in self.dependents[index]:
            self.waiting[dependent] -= 1


def _event_loop(instructions: Sequence[Instruction], launch_s: float, contended: set[str]) -> tuple[Floats, Floats]:
    state, now, done = _Lanes(instructions, launch_s, contended), 0.0, 0
    while done < len(instructions):
        next_issue = state.start_ready(now)
        rates = state.rates()
        until = min((state.left[i] / rate for i, rate in rates.items()), default=math.inf)
        step = min(until, next_issue - now)
        now = next_issue if step < until else now + step
        for index, rate in rates.items():
            state.left[index] -= step * rate
        for index in [i for i, left in state.left.items() if left <= 1e-15]:
            state.finish(index, now)
            done += 1
    return state.start, state.end


def _streams(instructions: Sequence[Instruction], start: Floats, end: Floats, compute: str) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds in which any lane of a stream is busy and, but for compute, the part of them in which compute stands still."""
    members: dict[str, list[int]] = {}
    for index, item in enumerate(instructions):
        members.setdefault(item.stream, []).append(index)
    intervals = {stream: _merged(start[ids], end[ids]) for stream, ids in members.items()}
    busy = {stream: float((till - since).sum()) for stream, (since, till) in intervals.items()}
    hidden_until = _busy_until(*intervals.get(compute, (start[:0], end[:0])))
    exposed = {}
    for stream, (since, till) in intervals.items():
        if stream != compute:
            exposed[stream] = max(0.0, busy[stream] - float((hidden_until(till) - hidden_until(since)).sum()))
    return busy, exposed


def _merged(start: Floats, end: Floats) -> tuple[Floats, Floats]:
    """Intervals that do not overlap, in order, which cover what these do."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    apart = np.flatnonzero(start[1:] > end[:-1]) + 1
    return start[np.r_[0, apart]], end[np.r_[apart - 1, len(end) - 1]]


def _busy_until(start: Floats, end: Floats) -> Any:
    """t -> seconds a stream with these busy intervals, disjoint and in order, was busy before t."""
    if not len(start):
        return np.zeros_like
    times = np.stack([start, end], axis=1).ravel()
    seconds = np.stack([np.zeros(len(start)), end - start], axis=1).ravel().cumsum()
    return lambda t: np.interp(t, times, seconds)


# --- memory ------------------------------------------------------------------------------------------------------------------------


class _Changes:
    """Changes of a pool's use, in columns: a tuple for each would keep the garbage collector busy for longer than all else takes."""

    def __init__(self) -> None:
        self.time_s: list[float] = []
        self.turn: list[int] = []  # of changes at the same time, which comes first
        self.num_bytes: list[int] = []
        self.buffers: list[Buffer] = []

    def add(self, time_s: float, turn: int, num_bytes: int, buffer: Buffer) -> None:
        self.time_s.append(time_s)
        self.turn.append(turn)
        self.num_bytes.append(num_bytes)
        self.buffers.append(buffer)

    def use(self) -> tuple[Peak, tuple[Floats, Floats]]:
        """The peak, and (time, bytes) after every change."""
        times = np.array(self.time_s)
        order = np.lexsort((np.array(self.turn), times))
        deltas = np.array(self.num_bytes, dtype=np.int64)[order]
        used = deltas.cumsum()
        top = int(used.argmax())
        until = order[: top + 1].tolist()
        peak = Peak(num_bytes=int(used[top]), time_s=float(times[order[top]]), owners=self._owners(until))
        return peak, (times[order], used.astype(float))

    def _owners(self, until: list[int]) -> tuple[tuple[str, int], ...]:
        """Live bytes by owner after these changes, largest first."""
        total: dict[str, int] = {}
        for i in until:
            owner = self.buffers[i].owner or self.buffers[i].name
            total[owner] = total.get(owner, 0) + self.num_bytes[i]
        return tuple(sorted(((o, n) for o, n in total.items() if n > 0), key=lambda pair: (-pair[1], pair[0])))


def _memory(
    instructions: Sequence[Instruction], resident: tuple[Buffer, ...], start: Floats, end: Floats
) -> tuple[dict[str, Peak], dict[str, tuple[Floats, Floats]]]:
    live = {buffer.name: buffer for buffer in resident}
    changes: dict[str, _Changes] = defaultdict(_Changes)
    for buffer in resident:
        changes[buffer.pool].add(0.0, -1, buffer.num_bytes, buffer)
    for index, (item, begin, finish) in enumerate(zip(instructions, start.tolist(), end.tolist(), strict=True)):
        for buffer in item.allocs:
            if buffer.name in live:
                raise ValueError(f"instruction {index} ({item.name}) allocates {buffer.name!r}, which is live already")
            live[buffer.name] = buffer
            changes[buffer.pool].add(begin, 2 * index, buffer.num_bytes, buffer)
        for name in item.frees:
            if name not in live:
                raise ValueError(f"instruction {index} ({item.name}) frees {name!r}, which is not live")
            buffer = live.pop(name)
            changes[buffer.pool].add(finish, 2 * index + 1, -buffer.num_bytes, buffer)
    found = {pool: change.use() for pool, change in changes.items()}
    return {pool: peak for pool, (peak, _) in found.items()}, {pool: memory for pool, (_, memory) in found.items()}


# --- the timeline -------------------------------------------------------------------------------------------------------------------


def chrome_trace(instructions: Sequence[Instruction], result: Simulation, *, process: str = "predicted", pid: int = 0) -> dict[str, Any]:
    """The step as Chrome/Perfetto trace JSON: a track per lane of a stream, a counter per pool; times in microseconds."""
    tracks = {queue: tid for tid, queue in enumerate(dict.fromkeys(item.queue for item in instructions))}
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}}]
    for queue, tid in tracks.items():
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": " ".join(queue).strip()}})
    starts, ends = (result.start_s * 1e6).tolist(), (result.end_s * 1e6).tolist()
    for item, begin, finish in zip(instructions, starts, ends, strict=True):
        event = {"ph": "X", "name": item.name, "pid": pid, "tid": tracks[item.queue], "ts": begin, "dur": finish - begin}
        if item.op_class:
            event["cat"] = item.op_class
        events.append(event)
    for pool, (times, used) in result.memory.items():
        for at, num_bytes in zip((times * 1e6).tolist(), used.tolist(), strict=True):
            events.append({"ph": "C", "name": f"memory {pool}", "pid": pid, "ts": at, "args": {"bytes": num_bytes}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def seconds_per_class(instructions: Sequence[Instruction], result: Simulation) -> Mapping[str, float]:
    """Busy seconds by op class (the stream's name where an instruction has none)."""
    total: dict[str, float] = {}
    for item, seconds in zip(instructions, (result.end_s - result.start_s).tolist(), strict=True):
        key = item.op_class or item.stream
        total[key] = total.get(key, 0.0) + seconds * item.num_runs
    return total
