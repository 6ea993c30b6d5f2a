"""What would make a step fit that does not: changes of limits, precision, micro-batches and batch, each tried by the planner.

`diagnose` says how little device memory the step can do with, when the leanest plan's peak is and what it consists of, and which changes
make the step fit at which predicted time. Every answer is a plan that was made; what the time did not suffice for is listed as untried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..cost_model.cluster import Cluster
from .analyse import Analysis, analyse
from .capture import capture
from .capture_tree import batch_tensors, map_tensors
from .frontier import Progress, Trials, silent, smallest
from .limits import Limits, limits_text, memory_limits
from .plan import Plan
from .residency import DEVICE, DISK, HOST

BUDGET_S = 60.0
_DIVISORS = (2, 4)
_MICRO_BATCHES = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked to be planned: the arguments of `opweave.plan`. options: those of `plan_step` (mesh, force, places, ...)."""

    model: nn.Module
    cluster: Cluster
    batch: Any
    limits: Limits
    optimizer: torch.optim.Optimizer | None = None
    loss_fn: Callable[[nn.Module, Any], Any] | None = None
    clip_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    accumulate: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def analysis(self) -> Analysis:
        """The step, captured and analysed."""
        return analyse(
            capture(
                self.model, self.batch, loss_fn=self.loss_fn, optimizer=self.optimizer, clip_grad_norm=self.clip_grad_norm,
                autocast=self.autocast, accumulate=self.accumulate,
            )
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change that was tried. same_work_s: predicted seconds for as many samples as one step was to have; None where nothing fits.

    step_time_s, peak_bytes: of one step with the change.
    """

    change: str
    fits: bool
    same_work_s: float | None = None
    step_time_s: float | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why a step does not fit, and what would.

    limits: bytes per pool that were given. least_bytes: the smallest device limit for which a plan was found with the other pools as given;
    no plan was found for refused_bytes. peak_at, peak_owner: the worst moment of that leanest plan and what is alive then, largest first.
    suggestions: changes that were tried, the cheapest first. untried: those that the time did not suffice for.
    """

    limits: Limits
    least_bytes: int
    refused_bytes: int
    peak_at: str
    peak_owner: list[dict[str, Any]]
    suggestions: list[Suggestion]
    untried: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """text: for people. request: with the change. recapture: its step is another one. num_steps: of it that do the work of one."""

    text: str
    request: Request
    recapture: bool = False
    num_steps: int = 1


def what_would_fit(
    model: nn.Module, cluster: Cluster | str, batch: Any, *, memory_limit: Any = None, budget_s: float = BUDGET_S,
    optimizer: torch.optim.Optimizer | None = None, loss_fn: Callable[[nn.Module, Any], Any] | None = None,
    clip_grad_norm: float | None = None, autocast: torch.dtype | None = None, accumulate: int = 1, **options: Any,
) -> Diagnosis:  # fmt: skip
    """What would make a step fit: `diagnose` with the arguments of `opweave.plan`. budget_s: seconds after which nothing new is tried.

    Raises DoesNotFitError where no device of any size would do (forced places that need more of another pool than there is).
    """
    where = Cluster.resolve(cluster) if isinstance(cluster, str) else cluster
    request = Request(
        model=model, cluster=where, batch=batch, limits=memory_limits(memory_limit, where), optimizer=optimizer, loss_fn=loss_fn,
        clip_grad_norm=clip_grad_norm, autocast=autocast, accumulate=accumulate, options=options,
    )  # fmt: skip
    return diagnose(request, budget_s=budget_s)


def diagnose(request: Request, *, budget_s: float = BUDGET_S, progress: Progress = silent) -> Diagnosis:
    """Try what could make a step fit, until the time is over; the smallest device memory is looked for last, at least coarsely."""
    deadline = time.perf_counter() + budget_s
    analysis = request.analysis()
    tried: list[Suggestion] = []
    untried: list[str] = []
    for change in _changes(request):
        left_s = deadline - time.perf_counter()
        if left_s <= 0:
            untried.append(change.text)
            continue
        progress(change.text)
        tried.append(_try(change, analysis, left_s))
    trials = Trials(analysis=analysis, cluster=request.cluster, limits=request.limits, options=request.options, progress=progress)
    least = smallest(trials, deadline=deadline)
    tried.append(_suggestion(f"--memory-limit {limits_text({DEVICE: least.limit_bytes})}: a larger device", least.plan))
    return Diagnosis(
        limits=request.limits, least_bytes=least.limit_bytes, refused_bytes=least.refused_bytes, peak_at=least.plan.predicted["peak_at"],
        peak_owner=least.plan.predicted["peak_owner"], suggestions=sorted(tried, key=_cost), untried=untried,
    )  # fmt: skip


def _cost(suggestion: Suggestion) -> float:
    return math.inf if suggestion.same_work_s is None else suggestion.same_work_s


def _changes(request: Request) -> Iterator[_Change]:
    """What is worth trying, quick ones first."""
    for pool, num_bytes in available(request.cluster).items():
        if request.limits.get(pool, 0) < num_bytes:
            limits = request.limits | {pool: num_bytes}
            text = f"--memory-limit {limits_text({pool: num_bytes})}: all of the {pool}"
            yield _Change(text=text, request=replace(request, limits=limits))
    if request.autocast is None:
        text = "--autocast bf16: matrix products and activations in bfloat16"
        yield _Change(text=text, request=replace(request, autocast=torch.bfloat16), recapture=True)
    size = batch_size(request.batch)
    if size is None:
        return
    for factor in _MICRO_BATCHES:
        num = factor * request.accumulate
        if size % num == 0:
            text = f"--accumulate {num}: {num} micro-batches of {size // num} samples"
            yield _Change(text=text, request=replace(request, accumulate=num), recapture=True)
    for divisor in _DIVISORS:
        if size > divisor and size % (divisor * request.accumulate) == 0:
            smaller = replace(request, batch=first_part(request.batch, divisor))
            text = f"--batch: {size // divisor} samples a step instead of {size}"
            yield _Change(text=text, request=smaller, recapture=True, num_steps=divisor)


def _try(change: _Change, analysis: Analysis, left_s: float) -> Suggestion:
    request = change.request
    options = {**request.options, "time_limit_s": min(left_s, float(request.options.get("time_limit_s", left_s)))}
    changed = request.analysis() if change.recapture else analysis
    plan = Trials(analysis=changed, cluster=request.cluster, limits=request.limits, options=options).within(request.limits)
    return Suggestion(change=change.text, fits=False) if plan is None else _suggestion(change.text, plan, change.num_steps)


def _suggestion(change: str, plan: Plan, num_steps: int = 1) -> Suggestion:
    seconds = float(plan.predicted["step_time_s"])
    return Suggestion(
        change=change, fits=True, same_work_s=num_steps * seconds, step_time_s=seconds, peak_bytes=dict(plan.predicted["peak_bytes"])
    )


def available(cluster: Cluster) -> Limits:
    """Bytes per device of the tiers behind it, where the cluster has them."""
    found: Limits = {}
    if cluster.device.kind != "cpu":  # there the device is the host's memory
        found[HOST] = float(cluster.host_bytes_per_device)
    if cluster.disk is not None:
        found[DISK] = float(cluster.disk.capacity_bytes // cluster.devices_per_node)
    return found


def batch_size(batch: Any) -> int | None:
    """The leading size that all tensors of a batch share; None where they share none."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in batch_tensors(batch).values()}
    return sizes.pop() if len(sizes) == 1 and min(sizes) > 0 else None


def first_part(batch: Any, divisor: int) -> Any:
    """The first samples of a batch, one in `divisor`."""
    return map_tensors(batch, lambda _, tensor: tensor[: tensor.shape[0] // divisor])
