"""Predicted against measured: run a plan on this job's ranks, time every instruction, and set it beside the simulation.

The executor's tracked text reports after every instruction; the time between two reports is the instruction's. On a GPU each report
waits for the device, so overlap is not seen there; the step time is measured apart, without reports.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .compiler.api import compile as compile_step
from .compiler.plan import Plan
from .compiler.timeline import timeline
from .compiler.training_step import TrainingStep
from .cost_model.cluster import Cluster
from .cost_model.simulate import Instruction
from .host_memory import keep_freed_memory
from .runtime import collectives
from .runtime.execute import gather_inputs, store_outputs, write
from .runtime.program import shard_inputs

FORMAT = "opweave-profile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A recorded run. step_time_s: lower quintile of the steps, slowest rank. seconds: by instruction name, of this rank."""

    step_time_s: float
    peak_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """Raises ValueError for anything but a recorded profile."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'this is no profile: its "format" is not "{FORMAT}"; record one with `opweave compare PLAN --record FILE`')
        return cls(**{k: v for k, v in data.items() if k != "format"})


def run_profile(step: TrainingStep, batch: Any, *, steps: int = 10) -> Profile:
    """Train `steps` steps for the step time, then a few with a clock at every instruction. All ranks call it."""
    keep_freed_memory()
    step(batch)
    step(batch)
    times = []
    for _ in range(steps):
        _barrier()
        begin = time.perf_counter()
        step(batch)
        _synchronise()
        times.append(time.perf_counter() - begin)
    assert step.executor is not None and step.executor.memory is not None
    runs = [_timed_instructions(step, batch) for _ in range(max(3, steps))]
    seconds = {name: _quintile([run[name] for run in runs]) for name in runs[0]}
    return Profile(step_time_s=_slowest(_quintile(times)), peak_bytes=step.executor.memory.peak_bytes, seconds=seconds)


def _quintile(times: list[float]) -> float:
    """The lower quintile, as calibration takes it: other programs on the machine disturb it little."""
    return sorted(times)[len(times) // 5]


def _timed_instructions(step: TrainingStep, batch: Any) -> dict[str, float]:
    """Seconds by node name of one step."""
    executor, program = step.executor, step.program
    assert executor is not None and program is not None
    nodes = list(program.graph.nodes)
    run = write(program.graph, tracked=True).bind(executor._bindings())
    pieces = shard_inputs(program, step._inputs(batch), executor.groups.coords)
    values = [executor.groups.coords, *gather_inputs(program, executor.state, pieces, executor.device)]
    clock, wait = time.perf_counter, torch.cuda.synchronize if torch.cuda.is_available() else None
    reports: list[tuple[int, float]] = []

    def track(slot: int, _: Any) -> None:
        if wait is not None:
            wait()
        reports.append((slot, clock()))

    _barrier()
    begin = clock()
    with torch.no_grad():
        store_outputs(program, executor.state, run(values, track, lambda slots: None))
    seconds = {nodes[slot].name: at - before for (slot, at), before in zip(reports, [begin, *(at for _, at in reports)], strict=False)}
    names = {n.name for n in nodes if n.op == "call_function"}
    return {name: s for name, s in seconds.items() if name in names}


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _slowest(seconds: float) -> float:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return seconds
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, seconds)
    return max(found)


def compare(
    plan: Plan, model: Any, batch: Any, cluster: Cluster, *, optimizer: Any, profile: Profile | None = None, steps: int = 10
) -> tuple[dict[str, Any], Profile]:
    """(report, profile). report: step_time_error, peak_error, rows per class, factors that would correct the calibration.

    profile: a recorded one instead of a run. Errors are predicted / measured - 1.
    """
    step = compile_step(model, cluster, optimizer=optimizer, plan=plan).prepare(batch)
    assert step.program is not None
    line = timeline(step.program, cluster)
    result = line.simulate()
    found = profile or run_profile(step, batch, steps=steps)
    rows = _rows(line.instructions, _kinds(step), found.seconds)
    peak = result.peaks["device"].num_bytes
    report = {
        "predicted": {"step_time_s": result.step_time_s, "peak_bytes": peak, "exposed_s": result.exposed_s},
        "measured": {"step_time_s": found.step_time_s, "peak_bytes": found.peak_bytes, "instructions_s": sum(found.seconds.values())},
        "step_time_error": result.step_time_s / found.step_time_s - 1,
        "peak_error": peak / found.peak_bytes - 1,
        "rows": rows,
        "factors": _factors(cluster, rows),
    }
    return report, found


def _kinds(step: TrainingStep) -> dict[str, str]:
    """wait instruction -> the collective it waits for: the time of a collective is its start's and its wait's."""
    assert step.program is not None
    found = {}
    for node in step.program.graph.nodes:
        if node.op == "call_function" and node.target is collectives.wait:
            found[node.name] = node.args[0].target.__name__.removesuffix("_bucket")
    return found


def _rows(instructions: list[Instruction], kinds: Mapping[str, str], seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    totals: dict[str, list[float]] = {}
    for item in instructions:
        total = totals.setdefault(kinds.get(item.name, item.op_class), [0.0, 0.0, 0])
        total[0] += item.seconds
        total[1] += seconds.get(item.name, 0.0)
        total[2] += item.seconds > 0
    rows = [
        {"class": name, "ops": int(n), "predicted_s": p, "measured_s": m, "error": p / m - 1 if m and name != "view" else None}
        for name, (p, m, n) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["measured_s"])


def _factors(cluster: Cluster, rows: list[dict[str, Any]]) -> dict[str, float]:
    """measured / predicted of the classes that have a measured curve, for `calibrate --from-profile`."""
    ratio = {row["class"]: row["measured_s"] / row["predicted_s"] for row in rows if row["predicted_s"] > 0 and row["measured_s"] > 0}
    return {name: ratio[name.partition("/")[0]] for name in cluster.device.tables if name.partition("/")[0] in ratio}
