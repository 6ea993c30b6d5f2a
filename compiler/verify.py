"""Evidence: a plan run in lockstep (all ranks in one process) against the unmodified model trained on one device."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..cost_model.cluster import Cluster, Link
from ..runtime.lockstep import LockstepExecutor
from ..runtime.sharding import unravel
from ..runtime.state import ProgramState
from .analyse import Analysis, analyse
from .capture import capture, default_loss
from .capture_tree import map_tensors
from .lower import lower
from .micro_batches import micro_batch, micro_batches_asked
from .plan import Plan
from .planner import mesh_of, plan_step, show_mesh
from .training_step import step_inputs

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference accepted, by the dtype computed in: rounding of sums in another order, over a few steps."""

_EPS = 1e-3
"""Of Adam's denominator: a gradient that is zero but for rounding (of a bias in front of a batch norm) would be blown up to noise by the
usual 1e-8. float64 rounds too little for that."""


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
    loss_fn: Callable[[nn.Module, Any], Any] | None = None,
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
    if plan is not None and autocast is None:
        autocast = plan.autocast_dtype
    dtype = dtype or (torch.float64 if autocast is None else torch.float32)
    if autocast is not None and dtype != torch.float32:
        raise ValueError(f"dtype is {dtype}, but under autocast to {autocast} a step is compared in float32; leave dtype out")
    mesh = mesh_of(ranks if ranks is not None else plan.mesh if plan is not None else (2,))
    if plan is not None and mesh != plan.mesh:
        raise ValueError(
            f"the plan is for mesh {show_mesh(plan.mesh)}, ranks is {show_mesh(mesh)}; leave ranks out or give ranks={plan.mesh}"
        )
    num_micro_batches = micro_batches_asked(accumulate, plan)
    optimizer_of = _optimizer_maker(model, optimizer, least_eps=0.0 if autocast is None else _EPS)
    model = copy.deepcopy(model).to(dtype)
    batch = map_tensors(batch, lambda _, t: t.to(dtype) if t.is_floating_point() else t)
    reference_optimizer = optimizer_of(model)
    with computing_in(dtype):
        step = capture(
            model, batch, loss_fn=loss_fn, optimizer=reference_optimizer, clip_grad_norm=clip_grad_norm, autocast=autocast,
            accumulate=num_micro_batches,
        )  # fmt: skip
    analysis = analyse(step)
    cluster = cluster or _pretend_cluster(math.prod(mesh))
    if plan is None:
        plan = plan_step(analysis, cluster, mesh=mesh, force=force, memory_limit=memory_limit)
    else:
        plan.check(analysis.step)
    untrained = None if autocast is None else copy.deepcopy(model)
    initial = None if untrained is None else {name: p.detach().clone() for name, p in untrained.named_parameters()}
    allowed = TOLERANCE[autocast or dtype]
    losses, params, counts = _lockstep(analysis, plan, model, reference_optimizer, batch, steps)
    if any(i.kind == "seed" for i in analysis.step.inputs):
        single = plan_step(analysis, _pretend_cluster(1), mesh=(1,))
        expected_losses, expected, _ = _lockstep(analysis, single, model, reference_optimizer, batch, steps)
    else:
        with computing_in(dtype):
            parts = [micro_batch(batch, num_micro_batches, i) for i in range(num_micro_batches)]
            loss_of = _under(autocast, loss_fn or default_loss)
            expected_losses, expected = _plain(model, reference_optimizer, parts, steps, loss_of, clip_grad_norm)
        if untrained is not None and initial is not None:
            _, exact = _plain(untrained, optimizer_of(untrained), parts, steps, loss_fn or default_loss, clip_grad_norm)
            allowed = max(allowed, 2 * _difference(exact, expected, initial))
    report = VerifyReport(
        max_relative_difference={
            "loss": max(_relative(_scalar(a), _scalar(b)) for a, b in zip(losses, expected_losses, strict=True)),
            "parameters": _difference(params, expected, initial),
        },
        collectives=counts, replicated_ops=plan.replicated_ops, losses=losses,
        tolerance=allowed if tolerance is None else tolerance, plan=plan,
    )  # fmt: skip
    if not report.holds:
        worst = max(expected, key=lambda name: _relative(params[name], expected[name]))
        raise VerificationError(
            f"after {steps} steps on mesh {show_mesh(plan.mesh)} the losses differ by {report.max_relative_difference['loss']:.3g} and the "
            f"parameters by {report.max_relative_difference['parameters']:.3g} (most in {worst}), more than {report.tolerance:g}; "
            "please report this with the model: it is a fault of opweave or an op with a wrong user pattern"
        )
    return report


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


def _optimizer_maker(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, least_eps: float
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """How to make an optimizer like the user's (AdamW by default) for a copy of the model, group by group."""
    if optimizer is None:
        return lambda copied: torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr=1e-3, eps=_EPS, fused=True)
    name_of = {id(p): name for name, p in model.named_parameters()}
    unknown = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in name_of]
    if unknown:
        raise ValueError(f"{len(unknown)} of the optimizer's parameters are not the model's; make it from model.parameters()")

    def make(copied: nn.Module) -> torch.optim.Optimizer:
        params = dict(copied.named_parameters())
        groups = [
            {**group, "params": [params[name_of[id(p)]] for p in group["params"]], "fused": True, "foreach": None}
            | ({"eps": max(group["eps"], least_eps)} if "eps" in group else {})
            for group in optimizer.param_groups
        ]
        return type(optimizer)(groups)  # type: ignore[call-arg]

    return make


class _Promote(TorchFunctionMode):
    """Computes in float64 where the model asks for float32: models raise precision to float32 in losses and norms, which for a
    float64 model would lower it and hide what a comparison to 1e-10 is to show."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args, **kwargs)
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _under(autocast: torch.dtype | None, loss_fn: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """A loss function under autocast, entered anew for every call: inside, torch keeps the weights it has cast once."""
    if autocast is None:
        return loss_fn

    def loss(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=autocast):
            return loss_fn(model, batch)

    return loss


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """For float64: casts to float32 go to float64, and so do new tensors. Other dtypes: nothing."""
    if dtype != torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Promote():
            yield
    finally:
        torch.set_default_dtype(before)


def _pretend_cluster(num_devices: int) -> Cluster:
    """A cluster of the size of the mesh whose links cost next to nothing, so that tiny models get split, too: what is verified is the
    plan's results, not its price."""
    cpu = Cluster.preset("cpu", devices=num_devices)
    link = Link(latency_s=1e-9, bandwidth_bytes_per_s=1e12)
    return replace(cpu, name="lockstep", intra_node=link, inter_node=link, device=replace(cpu.device, launch_s=0.0))


def _lockstep(
    analysis: Analysis, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, steps: int
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, int]]:
    program = lower(analysis.step, analysis.factors, plan.assignment(analysis.step, analysis.factors), optimizer=type(optimizer).__name__)
    executor = LockstepExecutor(program, optimizer)
    executor.states = [
        ProgramState.from_model(program, model, unravel(rank, plan.mesh), store=store) for rank, store in enumerate(executor.stores)
    ]
    losses = [float(executor.run(step_inputs(analysis, batch, 0, i))[0]) for i in range(steps)]
    params = {}
    for key, port in program.stored.items():
        if key[0] in ("param", "buffer"):
            assert port.spec is not None
            params[key[1]] = port.spec.unshard([state.value(key) for state in executor.states])
    return losses, params, dict(executor.collectives.num)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Dtype of the first parameter."""
    return next(model.parameters()).dtype


def _plain(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[Any], steps: int, loss_fn: Callable[[nn.Module, Any], Any],
    clip: float | None,
) -> tuple[list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """Losses and values of the plain model. parts: the micro-batches of every step."""
    losses = []
    if hasattr(model, "set_experts_implementation") and dtype_of(model) == torch.float64:
        model.set_experts_implementation("eager")  # type: ignore[operator]  # transformers' default, grouped_mm, has no float64 kernel
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            result = loss_fn(model, part)
            loss = (result[0] if isinstance(result, (tuple, list)) else result) / len(parts)
            loss.backward()
            total += float(loss.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        losses.append(total)
    values = {name: p.detach() for name, p in model.named_parameters()} | {
        name: b.detach() for name, b in model.named_buffers() if b is not None
    }
    return losses, {name: v for name, v in values.items() if v.is_floating_point()}
