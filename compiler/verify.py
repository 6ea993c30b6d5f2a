"""Evidence: a plan run in lockstep (all ranks in one process) against the unmodified model trained on one device."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cost_model.cluster import Cluster
from .analyse import analyse
from .capture import LossFn, capture, default_loss
from .capture_tree import map_tensors
from .micro_batches import micro_batch, micro_batches_asked
from .plan import Plan
from .planner import mesh_of, plan_step, show_mesh
from .trainings import EPS, PlainTraining, computing_in, optimizer_maker, pretend_cluster, train_in_lockstep

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference accepted, by the dtype computed in: rounding of sums in another order, over a few steps."""

class VerificationError(AssertionError):
    """The planned step does not compute what the model computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """max_relative_difference: of the losses and of the parameters (largest difference over largest magnitude, per tensor; under autocast
    of all of them together, over the distance they were trained).

    collectives: kind → number in one step. replicated_ops: ops without a rule, with reason and count. plan: the plan that ran.
    """

    max_relative_difference: dict[str, float]
    collectives: dict[str, int]
    replicated_ops: list[dict[str, Any]]
    losses: list[float]
    tolerance: float
    plan: Plan

    @property
    def holds(self) -> bool:
        """Whether both differences are within the tolerance."""
        return all(d <= self.tolerance for d in self.max_relative_difference.values())


def verify(
    model: nn.Module,
    batch: Any,
    ranks: tuple[int, ...] | int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 3,
    dtype: torch.dtype | None = None,
    *,
    loss_fn: LossFn | None = None,
    clip_grad_norm: float | None = None,
    force: str | None = None,
    cluster: Cluster | None = None,
    plan: Plan | None = None,
    memory_limit: Any = None,
    accumulate: int | None = None,
    autocast: torch.dtype | None = None,
    tolerance: float | None = None,
) -> VerifyReport:
    """Train `steps` steps twice, by the plan on the mesh `ranks` in lockstep and as the plain model, in `dtype`, and compare.

    dtype: of the model's copy; by default float64, under autocast float32 (autocast does nothing to float64). autocast: of the forward
    pass, by default the plan's; Adam's eps is then 1e-3 at least, and allowed is twice what it makes of the plain model. The model and
    optimizer given are not changed (default: AdamW with eps=1e-3). A model with dropout in its forward pass is compared with its own
    one-device program (random numbers are opweave's).
    accumulate: the number of micro-batches of a step (default: the plan's, else 1); the plain model then runs the usual loop of backward
    passes before each update. Raises VerificationError where a difference exceeds `tolerance`.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least one step is needed to compare")
    autocast, dtype = _precision(autocast, dtype, plan)
    mesh = _mesh_asked(ranks, plan)
    num_micro_batches = micro_batches_asked(accumulate, plan)
    optimizer_of = optimizer_maker(model, optimizer, least_eps=0.0 if autocast is None else EPS)
    model = copy.deepcopy(model).to(dtype)
    batch = map_tensors(batch, lambda _, t: t.to(dtype) if t.is_floating_point() else t)
    trainer = optimizer_of(model)
    with computing_in(dtype):
        step = capture(
            model, batch, loss_fn=loss_fn, optimizer=trainer, clip_grad_norm=clip_grad_norm, autocast=autocast,
            accumulate=num_micro_batches,
        )  # fmt: skip
    analysis = analyse(step)
    if plan is None:
        plan = plan_step(analysis, cluster or pretend_cluster(math.prod(mesh)), mesh=mesh, force=force, memory_limit=memory_limit)
    else:
        plan.check(analysis.step)
    untrained = None if autocast is None else copy.deepcopy(model)
    initial = None if untrained is None else {name: p.detach().clone() for name, p in untrained.named_parameters()}
    allowed = TOLERANCE[autocast or dtype]
    found = train_in_lockstep(analysis, plan, model, trainer, batch, steps)
    if any(i.kind == "seed" for i in analysis.step.inputs):
        single = plan_step(analysis, pretend_cluster(1), mesh=(1,))
        expected = train_in_lockstep(analysis, single, model, trainer, batch, steps)
    else:
        parts = [micro_batch(batch, num_micro_batches, i) for i in range(num_micro_batches)]
        plainly = PlainTraining(micro_batches=parts, steps=steps, loss_fn=loss_fn or default_loss, clip_grad_norm=clip_grad_norm)
        with computing_in(dtype):
            expected = plainly.run(model, trainer, autocast)
        if untrained is not None:
            exact = plainly.run(untrained, optimizer_of(untrained), None)
            allowed = max(allowed, 2 * _difference(exact.values, expected.values, initial))
    report = VerifyReport(
        max_relative_difference={
            "loss": max(_relative(_scalar(a), _scalar(b)) for a, b in zip(found.losses, expected.losses, strict=True)),
            "parameters": _difference(found.values, expected.values, initial),
        },
        collectives=found.collectives, replicated_ops=plan.replicated_ops, losses=found.losses,
        tolerance=allowed if tolerance is None else tolerance, plan=plan,
    )  # fmt: skip
    if not report.holds:
        worst = max(expected.values, key=lambda name: _relative(found.values[name], expected.values[name]))
        raise VerificationError(_refusal(report, steps, worst))
    return report


def _precision(
    autocast: torch.dtype | None, dtype: torch.dtype | None, plan: Plan | None
) -> tuple[torch.dtype | None, torch.dtype]:
    """(autocast, dtype) of the comparison: autocast as the plan has it, where it is not given."""
    if plan is not None and autocast is None:
        autocast = plan.autocast_dtype
    dtype = dtype or (torch.float64 if autocast is None else torch.float32)
    if autocast is not None and dtype != torch.float32:
        raise ValueError(f"dtype is {dtype}, but under autocast to {autocast} a step is compared in float32; leave dtype out")
    return autocast, dtype


def _mesh_asked(ranks: tuple[int, ...] | int | None, plan: Plan | None) -> tuple[int, ...]:
    """The mesh of `ranks=`, which must be the plan's where there is one; two ranks where neither says."""
    mesh = mesh_of(ranks if ranks is not None else plan.mesh if plan is not None else (2,))
    if plan is not None and mesh != plan.mesh:
        raise ValueError(
            f"the plan is for mesh {show_mesh(plan.mesh)}, ranks is {show_mesh(mesh)}; leave ranks out or give ranks={plan.mesh}"
        )
    return mesh


def _refusal(report: VerifyReport, steps: int, worst: str) -> str:
    differences = report.max_relative_difference
    return (
        f"after {steps} steps on mesh {show_mesh(report.plan.mesh)} the losses differ by {differences['loss']:.3g} and the "
        f"parameters by {differences['parameters']:.3g} (most in {worst}), more than {report.tolerance:g}; "
        "please report this with the model: it is a fault of opweave or an op with a wrong user pattern"
    )


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


_SMALL = 1e-3


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest magnitude; tensors below 1e-3 everywhere (a bias that started at zero and whose gradient is
    zero but for rounding) are measured against 1e-3."""
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
        return math.inf
    if not b.numel():
        return 0.0
    return float((a.detach() - b.detach()).abs().max()) / max(float(b.detach().abs().max()), _SMALL)


def _difference(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor] | None
) -> float:
    """Of the worst parameter; given initial values, of all together, over the distance they were trained: a bias that has hardly moved
    is, in half precision, anywhere near."""
    if initial is None:
        return max(_relative(found[name], value) for name, value in expected.items())
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in initial)
    trained = sum(float((expected[name] - value).square().sum()) for name, value in initial.items())
    return math.sqrt(apart / trained) if trained else math.inf if apart else 0.0
