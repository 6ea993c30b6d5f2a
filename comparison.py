"""Predicted against measured: run a plan on this job's ranks, time every instruction, and set it beside the simulation.

How a step is recorded is in `runtime.profile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .compiler.api import compile as compile_step
from .compiler.plan import Plan
from .compiler.timeline import timeline
from .compiler.training_step import TrainingStep
from .cost_model.cluster import Cluster
from .cost_model.simulate import Instruction
from .host_memory import keep_freed_memory
from .runtime import collectives
from .runtime.profile import Profile


def run_profile(step: TrainingStep, batch: Any, *, steps: int = 10) -> Profile:
    """`step.profile` in a process that keeps freed memory, as calibration does. All ranks call it."""
    keep_freed_memory()
    return step.profile(batch, steps=steps)


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
        total[0] += item.seconds * item.num_runs
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
