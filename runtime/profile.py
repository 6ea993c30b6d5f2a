"""A recording of the runtime's own steps: how long a step takes, and when each instruction of one began and ended.

It is written as Chrome/Perfetto trace JSON with the tracks of `opweave simulate --trace`, so that both open side by side; beside the
events the file holds what `opweave compare PLAN --profile FILE` reads. The clock stands between instructions, so a recorded step takes a
little longer than the step time, which is measured apart. On a GPU each reading waits for the device: overlap is not seen there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import collectives
from .execute import Executor, gather_inputs, store_outputs, write
from .program import Inputs

FORMAT = "opweave-profile"
COMPUTE, COLLECTIVES = "compute", "collectives"
Read = tuple[str, float, float]  # an instruction, its begin and end


class Span(NamedTuple):
    """One instruction: seconds since the step began. A collective's reaches from its start to the end of its wait."""

    name: str
    stream: str
    begin_s: float
    end_s: float
    op: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A recorded run. step_time_s: lower quintile of the steps, slowest rank. seconds: by instruction name, of this rank, the mean of the
    middle half (the fast runs of each would add up to less than any step takes), of all micro-batches together.

    spans: of the last recorded step.
    """

    step_time_s: float
    peak_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    spans: tuple[Span, ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Trace JSON, with the rest beside the events."""
        facts = {"format": FORMAT, "step_time_s": self.step_time_s, "peak_bytes": self.peak_bytes, "seconds": self.seconds}
        return {**facts, "traceEvents": _events(self.spans), "displayTimeUnit": "ms"}

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """What `to_dict` made, without its spans. Raises ValueError for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(
                f'this is no profile: its "format" is not "{FORMAT}"; record one with `opweave compare PLAN --record FILE` or '
                "step.profile(batch, FILE)"
            )
        return cls(step_time_s=data["step_time_s"], peak_bytes=data["peak_bytes"], seconds=data["seconds"])


def _events(spans: tuple[Span, ...], pid: int = 1) -> list[dict[str, Any]]:
    tracks = {stream: tid for tid, stream in enumerate(dict.fromkeys(span.stream for span in spans))}
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": "measured"}}]
    events += [{"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}} for name, tid in tracks.items()]
    for name, stream, begin, end, op in spans:
        where = {"pid": pid, "tid": tracks[stream], "ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
        events.append({"ph": "X", "name": name, "cat": op, **where})
    return events


def record(executor: Executor, inputs: Inputs) -> tuple[list[Any], list[Read]]:
    """One step with a clock: (what `Executor.run` returns, (instruction, begin, end) in order)."""
    program = executor.program
    names = [node.name for node in program.graph.nodes]
    run = write(program.graph, tracked=True, into=executor._into).bind(executor._bindings())
    values = [executor.groups.coords, *gather_inputs(program, executor.state, inputs, executor.device)]
    clock, wait = time.perf_counter, torch.cuda.synchronize if executor.device.type == "cuda" else None
    read: list[tuple[int, float]] = []

    def track(slot: int, _: Any, workspace_bytes: int = 0) -> None:
        if wait is not None:
            wait()
        read.append((slot, clock()))

    barrier()
    begin = clock()
    with torch.no_grad():
        outputs = store_outputs(program, executor.state, run(values, track, lambda slots: None))
    ends = [at - begin for _, at in read]
    return outputs, [(names[slot], start, end) for (slot, _), start, end in zip(read, [0.0, *ends], ends, strict=False)]


def profile_steps(executor: Executor, step: Callable[[], Any], recorded: Callable[[], list[Read]], steps: int) -> Profile:
    """Time `steps` steps, then record some. step: takes one. recorded: takes one by `record`. All ranks call it.

    Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"a profile of {steps} steps has nothing in it; give 1 or more")
    step()
    step()
    times = []
    for _ in range(steps):
        barrier()
        begin = time.perf_counter()
        step()
        if executor.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    calls = {node.name for node in executor.program.graph.nodes if node.op == "call_function"}
    runs = [recorded() for _ in range(max(3, steps))]
    taken = [_seconds([read for read in run if read[0] in calls]) for run in runs]
    seconds = {name: _midmean([run[name] for run in taken]) for name in taken[0]}
    assert executor.memory is not None
    return Profile(
        step_time_s=_slowest(_quintile(times)), peak_bytes=executor.memory.peak_bytes, seconds=seconds, spans=_spans(executor, runs[-1])
    )


def _seconds(run: list[Read]) -> dict[str, float]:
    """Of each instruction in a step, all its micro-batches together."""
    out: dict[str, float] = {}
    for name, begin, end in run:
        out[name] = out.get(name, 0.0) + end - begin
    return out


def _spans(executor: Executor, run: list[Read]) -> tuple[Span, ...]:
    """Every call in the compute track, and every collective from its start to its wait in a track of its own."""
    nodes = {node.name: node for node in executor.program.graph.nodes if node.op == "call_function"}
    begins: dict[str, float] = {}
    spans = []
    for name, begin, end in run:
        begins[name] = begin
        if name not in nodes:
            continue
        node: Any = nodes[name]
        spans.append(Span(name, COMPUTE, begin, end, getattr(node.target, "__name__", str(node.target))))
        if node.target is collectives.wait:
            start = node.args[0]
            spans.append(Span(start.name, COLLECTIVES, begins[start.name], end, start.target.__name__))
    return tuple(spans)


def _quintile(times: list[float]) -> float:
    """The lower quintile: other programs on the machine disturb it little."""
    return sorted(times)[len(times) // 5]


def _midmean(times: list[float]) -> float:
    """The mean of the middle half, as calibration takes it."""
    ordered, quarter = sorted(times), len(times) // 4
    return statistics.fmean(ordered[quarter : len(times) - quarter])


def barrier() -> None:
    """Wait for all ranks; nothing in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _slowest(seconds: float) -> float:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return seconds
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, seconds)
    return float(max(found))
