"""Runs a planned step for some steps and says what was measured beside what was predicted: what `opweave run` prints.

Every rank runs it; what is reported is the slowest rank's time and the largest rank's bytes.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from .compiler.training_step import TrainingStep
from .runtime.resident import ResidentPeak, measure_resident_peak

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """step_time_s: median of the steps behind the first, which also accounts memory; None where there was one step only.

    peak_bytes: most bytes at once by pool, as the executor accounted them. offloaded_bytes, fetched_bytes: copied per step from and to the
    device. recomputed_ops: ops run a second time per step. rss_peak_bytes: what the device's tensors took of the process's memory in RAM at
    most: what it grew by in the steps behind the first, and the parameters, buffers and state that were there before; None where the system
    does not tell.
    """

    step_time_s: float | None
    peak_bytes: dict[str, int]
    offloaded_bytes: int
    fetched_bytes: int
    recomputed_ops: int
    rss_peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def run_steps(step: TrainingStep, batch: Any, num_steps: int, progress: Progress | None = None) -> tuple[Measured, list[float]]:
    """(what was measured, loss per step) of `num_steps` steps on one batch. The step is planned and set up before the clock runs."""
    step.prepare(batch)
    losses, times = [], []
    resident = None
    with contextlib.ExitStack() as stack:
        for number in range(num_steps):
            if number == 1:  # the first step also loads what the kernels need for themselves
                resident = _resident_peak(stack)
            begin = time.perf_counter()
            losses.append(float(step(batch)))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            if progress is not None:
                progress(number + 1, num_steps, f"loss {losses[-1]:.4f}")
    return _over_ranks(_measured(step, times[1:], resident)), losses


def _resident_peak(stack: contextlib.ExitStack) -> ResidentPeak | None:
    """Measured until the stack closes; None where the tensors are not in the process's memory, or the system does not tell."""
    if torch.cuda.is_available():
        return None
    try:
        return stack.enter_context(measure_resident_peak())
    except OSError:
        return None


def _measured(step: TrainingStep, times: list[float], resident: ResidentPeak | None) -> Measured:
    executor, program = step.executor, step.program
    assert executor is not None and executor.memory is not None and program is not None, "the step has not run"
    return Measured(
        step_time_s=statistics.median(times) if times else None,
        peak_bytes=dict(executor.memory.pools),
        offloaded_bytes=executor.traffic.offloaded_bytes,
        fetched_bytes=executor.traffic.fetched_bytes,
        recomputed_ops=program.num_recomputed,
        rss_peak_bytes=None if resident is None else resident.grown_bytes + executor.memory.stored_bytes,
    )


def _over_ranks(own: Measured) -> Measured:
    """The largest of each figure."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return own
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    times = [m.step_time_s for m in found if m.step_time_s is not None]
    return Measured(
        step_time_s=max(times) if times else None,
        peak_bytes={pool: max(m.peak_bytes[pool] for m in found) for pool in own.peak_bytes},
        offloaded_bytes=max(m.offloaded_bytes for m in found),
        fetched_bytes=max(m.fetched_bytes for m in found),
        recomputed_ops=max(m.recomputed_ops for m in found),
        rss_peak_bytes=None if own.rss_peak_bytes is None else max(m.rss_peak_bytes or 0 for m in found),
    )


def exceeded(peak_bytes: dict[str, int], limits: dict[str, float]) -> list[str]:
    """A sentence for every pool whose peak is above its limit; a pool that has none may not be used."""
    return [
        f"the {pool} held {num_bytes:,} bytes at once, its limit is {int(limits.get(pool, 0)):,}"
        for pool, num_bytes in peak_bytes.items()
        if num_bytes > limits.get(pool, 0)
    ]
