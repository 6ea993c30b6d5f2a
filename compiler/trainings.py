"""The two trainings that `verify` compares: a plan on all its ranks in lockstep, and the plain model on one device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..cost_model.cluster import Cluster, Link
from ..runtime.lockstep import LockstepExecutor
from ..runtime.sharding import unravel
from ..runtime.state import ProgramState
from .analyse import Analysis
from .capture import LossFn
from .lower import lower
from .plan import Plan
from .training_step import step_inputs

EPS = 1e-3
"""Of Adam's denominator: a gradient that is zero but for rounding (of a bias in front of a batch norm) would be blown up to noise by the
usual 1e-8. float64 rounds too little for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What some steps of training left. values: of parameters and buffers, by name. collectives: kind → number in one step."""

    losses: list[float]
    values: dict[str, torch.Tensor]
    collectives: dict[str, int]


def train_in_lockstep(
    analysis: Analysis, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, steps: int
) -> Trained:
    """By the plan, from the model's values, which stay as they are."""
    program = lower(analysis.step, analysis.factors, plan.assignment(analysis.step, analysis.factors), optimizer=type(optimizer).__name__)
    executor = LockstepExecutor(program, optimizer)
    executor.states = [
        ProgramState.from_model(program, model, unravel(rank, plan.mesh), store=store) for rank, store in enumerate(executor.stores)
    ]
    losses = [float(executor.run(step_inputs(analysis, batch, 0, i))[0]) for i in range(steps)]
    values = {}
    for key, port in program.stored.items():
        if key[0] in ("param", "buffer"):
            assert port.spec is not None
            values[key[1]] = port.spec.unshard([state.value(key) for state in executor.states])
    return Trained(losses=losses, values=values, collectives=dict(executor.collectives.num))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTraining:
    """How the plain model is trained. micro_batches: those of every step."""

    micro_batches: list[Any]
    steps: int
    loss_fn: LossFn
    clip_grad_norm: float | None

    def run(self, model: nn.Module, optimizer: torch.optim.Optimizer, autocast: torch.dtype | None) -> Trained:
        """Train the model in place. autocast: of the forward pass."""
        if hasattr(model, "set_experts_implementation") and next(model.parameters()).dtype == torch.float64:
            model.set_experts_implementation("eager")  # type: ignore[operator]  # transformers' default, grouped_mm, has no float64 kernel
        losses = [self._step(model, optimizer, _under(autocast, self.loss_fn)) for _ in range(self.steps)]
        tensors = [*model.named_parameters(), *model.named_buffers()]
        values = {name: t.detach() for name, t in tensors if t.is_floating_point()}
        return Trained(losses=losses, values=values, collectives={})

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: LossFn) -> float:
        """The loss of one step: the mean over its micro-batches."""
        optimizer.zero_grad()
        total = 0.0
        for part in self.micro_batches:
            result = loss_fn(model, part)
            loss = (result[0] if isinstance(result, (tuple, list)) else result) / len(self.micro_batches)
            loss.backward()
            total += float(loss.detach())
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.clip_grad_norm)
        optimizer.step()
        return total


def _under(autocast: torch.dtype | None, loss_fn: LossFn) -> LossFn:
    """A loss function under autocast, entered anew for every call: inside, torch keeps the weights it has cast once."""
    if autocast is None:
        return loss_fn

    def loss(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=autocast):
            return loss_fn(model, batch)

    return loss


def optimizer_maker(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, least_eps: float
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """How to make an optimizer like the user's (AdamW by default) for a copy of the model, group by group."""
    if optimizer is None:
        return lambda copied: torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr=1e-3, eps=EPS, fused=True)
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


def pretend_cluster(num_devices: int) -> Cluster:
    """A cluster of the size of the mesh whose links cost next to nothing, so that tiny models get split, too: what is verified is the
    plan's results, not its price."""
    cpu = Cluster.preset("cpu", devices=num_devices)
    link = Link(latency_s=1e-9, bandwidth_bytes_per_s=1e12)
    return replace(cpu, name="lockstep", intra_node=link, inter_node=link, device=replace(cpu.device, launch_s=0.0))
