"""The compiled step a user calls: it plans at the first batch, then runs that plan on this rank.

`TrainingStep` ties the two halves together: the compiler makes a plan and lowers it, `runtime.execute` runs it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cost_model.cluster import Cluster
from ..runtime.execute import Executor
from ..runtime.groups import AxisGroups
from ..runtime.profile import Profile, Read, profile_steps, record
from ..runtime.program import Inputs, LocalProgram, shard_inputs
from ..runtime.state import ProgramState
from ..runtime.tiers import TierOptions
from ..torch_compat import mark_stepped
from .analyse import Analysis
from .capture_tree import batch_constants, batch_tensors
from .limits import memory_limits
from .lower import lower
from .micro_batches import check_batch, micro_batch
from .plan import Plan, fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """Options of `compile`; see there."""

    loss_fn: Callable[[nn.Module, Any], Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    clip_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    accumulate: int = 1
    mesh: tuple[int, ...] | None = None
    force: str | None = None
    memory_limit: Any = None
    places: str = "auto"
    objective: str = "time"
    disk_path: str | os.PathLike[str] | None = None
    plan: Plan | None = None
    seed: int = 0
    device: str | None = None
    time_limit_s: float = 60.0
    cluster_given: bool = False
    keep_model: bool = True


class StepError(ValueError):
    """A step is used in a way it cannot work."""


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite."""


class TrainingStep:
    """One training step: `loss = step(batch)` runs forward, backward and update. Made by `opweave.compile`.

    `batch` is the global batch, the same on every rank. The first call captures, plans and lowers for its shapes; later batches must have
    the same shapes and dtypes. `plan`, `analysis` and `program` are there from then on. With `accumulate=` the loss is the mean of the
    micro-batches', and `extras`, what the loss function returns beside it, are those of the last one.
    """

    def __init__(self, model: nn.Module, cluster: Cluster, options: StepOptions, make: Callable[[TrainingStep, Any], None]) -> None:
        self.model = model
        self.cluster = cluster
        self.options = options
        self._make = make
        self._plan = options.plan
        self.analysis: Analysis | None = None
        self.program: LocalProgram | None = None
        self.executor: Executor | None = None
        self.num_steps = 0
        self.extras: Any = None
        self._pending_load: str | None = None

    # -- making -------------------------------------------------------------------------------------------------------

    def prepare(self, batch: Any) -> TrainingStep:
        """Capture, plan and lower for a batch's shapes without running; done by the first call otherwise. Returns self."""
        if self.executor is None:
            self._make(self, batch)
        return self

    def install(self, analysis: Analysis, plan: Plan) -> None:
        """Lower a plan and set up this rank. Called by the pipeline in `api`."""
        _check_materialised(self.model)
        self.analysis, self._plan = analysis, plan
        device = self.device
        optimizer = self.options.optimizer
        assignment = plan.assignment(analysis.step, analysis.factors)
        self.program = lower(
            analysis.step, analysis.factors, assignment, device=str(device), optimizer=type(optimizer).__name__ if optimizer else ""
        )
        groups = AxisGroups(plan.mesh)
        o = self.options
        shared = (o.mesh, o.force, o.memory_limit, o.clip_grad_norm, o.autocast, o.accumulate, o.seed)
        groups.check_agreement({"plan": plan_text(plan), "step": fingerprint(analysis.step), "options": repr(shared)})
        limits = None if o.memory_limit is None else {p: int(n) for p, n in memory_limits(o.memory_limit, self.cluster).items()}
        tiers = TierOptions(disk_path=o.disk_path)
        self.executor = Executor(self.program, groups, device, optimizer, limit_bytes=limits, tiers=tiers)
        keep = self.options.keep_model
        self.executor.state = ProgramState.from_model(
            self.program, self.model, groups.coords, device=device, optimizer=optimizer, share=not keep, store=self.executor.store
        )
        if not keep:
            self.executor.state.release_model(self.model)
        if self._pending_load is not None:
            path, self._pending_load = self._pending_load, None
            self.load(path)

    @property
    def device(self) -> torch.device:
        """Where this rank computes. Raises StepError where the cluster's devices are not on this machine."""
        if self.options.device is not None:
            return torch.device(self.options.device)
        if self.cluster.device.kind != "cuda":
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise StepError(
                f"cluster {self.cluster.name!r} has CUDA devices, this machine has none: a plan for it can be made here "
                "(opweave.plan), but runs there. To run here use Cluster.detect()"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun
        torch.cuda.set_device(device)
        return device

    # -- running ------------------------------------------------------------------------------------------------------

    def __call__(self, batch: Any) -> torch.Tensor:
        """One step on the global batch; returns the loss (a 0-dim tensor). Raises NonFiniteLossError on a NaN or infinite loss."""
        self.prepare(batch)
        assert self.executor is not None and self.program is not None
        pieces = shard_inputs(self.program, self._inputs(batch), self.executor.groups.coords)
        return self._finish(self.executor.run(pieces))

    def profile(self, batch: Any, path: str | os.PathLike[str] | None = None, *, steps: int = 10) -> Profile:
        """Train some steps with a clock: step time, peak, and when each instruction ran. All ranks call it.

        path: where rank 0 writes the recording, Chrome/Perfetto trace JSON that `opweave compare PLAN --profile FILE` reads too.
        """
        executor = self.prepare(batch).executor
        assert executor is not None and self.program is not None
        program = self.program

        def recorded() -> list[Read]:
            outputs, spans = record(executor, shard_inputs(program, self._inputs(batch), executor.groups.coords))
            self._finish(outputs)
            return spans

        made = profile_steps(executor, lambda: self(batch), recorded, steps)
        if path is not None and not any(executor.groups.coords):
            Path(path).write_text(json.dumps(made.to_dict()))
        return made

    def _inputs(self, batch: Any) -> Inputs:
        assert self.analysis is not None
        return step_inputs(self.analysis, batch, self.options.seed, self.num_steps)

    def _finish(self, outputs: list[Any]) -> torch.Tensor:
        assert self.analysis is not None
        self.num_steps += 1
        if self.options.optimizer is not None:
            mark_stepped(self.options.optimizer)
        kinds = [o.kind for o in self.analysis.step.outputs if o.kind in ("loss", "extra", "grad")]
        loss = outputs[0]
        extras = [value for kind, value in zip(kinds, outputs, strict=True) if kind == "extra"]
        self.extras = self.analysis.step.extra_spec.rebuild(extras) if self.analysis.step.extra_spec else None
        if not bool(torch.isfinite(loss).all()):
            raise NonFiniteLossError(
                f"the loss of step {self.num_steps} is {loss.item()}; parameters and optimizer state are as before this step. Look at the "
                "batch, lower the learning rate, or pass clip_grad_norm="
            )
        return loss

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan. Raises StepError before the first batch (its shapes decide the plan)."""
        if self._plan is None:
            raise StepError(
                "there is no plan yet: it is made for the shapes of the first batch; call step(batch) or step.prepare(batch) first"
            )
        return self._plan

    @property
    def state(self) -> ProgramState:
        """This rank's parameters, buffers and optimizer state."""
        if self.executor is None:
            raise StepError("there is no state yet: call step(batch) or step.prepare(batch) first")
        return self.executor.state

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers and optimizer state as DTensors."""
        return self.state.state_dict(self._groups())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint any plan and world size can load. All ranks call it; an interrupted save leaves the old one whole."""
        self.state.save(path, self._groups(), extra={"num_steps": self.num_steps})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a checkpoint, whatever plan and world size wrote it. Before the first batch it is remembered and loaded then."""
        if self.executor is None:
            self._pending_load = os.fspath(path)
            return
        extra = self.state.load(path, self._groups())
        self.num_steps = int(extra.get("num_steps", 0))

    def export_safetensors(self, path: str | os.PathLike[str]) -> None:
        """Write the plain model's state dict as one safetensors file (by rank 0; all ranks call it)."""
        self.state.export_safetensors(path, self._groups(), self.model)

    def to_model(self) -> nn.Module:
        """Copy the trained parameters and buffers back into the user's model (all ranks call it). Returns the model."""
        self.state.to_model(self.model, self._groups())
        return self.model

    def _groups(self) -> AxisGroups:
        assert self.executor is not None
        return self.executor.groups


def step_inputs(analysis: Analysis, batch: Any, seed: int, num_steps: int) -> Inputs:
    """Global inputs of a step by port name: the batch's tensors and a seed, of every micro-batch where there are several."""
    num = analysis.step.num_micro_batches
    _check_batch(analysis, batch)
    if num > 1:
        check_batch(batch, num)
    values = [_named_inputs(analysis, micro_batch(batch, num, i), (seed << 32) + num_steps * num + i) for i in range(num)]
    return values if num > 1 else values[0]


def _named_inputs(analysis: Analysis, batch: Any, seed: int) -> dict[str, Any]:
    names = {i.fqn: i.name for i in analysis.step.inputs if i.kind == "batch"}
    out: dict[str, Any] = {names[path]: tensor for path, tensor in batch_tensors(batch).items()}
    for info in analysis.step.inputs:
        if info.kind == "seed":
            out[info.name] = torch.tensor(seed, dtype=torch.int64)
    return out


def _check_batch(analysis: Analysis, batch: Any) -> None:
    """Raises StepError where a batch is not like the one the step was compiled with."""
    names = {i.fqn for i in analysis.step.inputs if i.kind == "batch"}
    given = batch_tensors(batch)
    if set(given) != names:
        raise StepError(
            f"the batch has tensors {sorted(given)}, the batch this step was compiled with had {sorted(names)}; "
            "give batches of one structure"
        )
    constants, had = batch_constants(batch), analysis.step.batch_constants
    changed = sorted(path for path in {*constants, *had} if not _equal(constants.get(path), had.get(path)))
    if changed:
        raise StepError(
            f"{changed[0]!r} of the batch is {constants.get(changed[0])!r}, it was {had.get(changed[0])!r} when the step was "
            "compiled: values that are no tensors are fixed then; make it a tensor, or compile another step"
        )
    for path, tensor in given.items():
        if tensor.device.type == "meta":
            raise StepError(f"the batch tensor {path!r} is on the meta device: it has no data to train on")


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:  # values without a truth value of equality (arrays) count as changed
        return False


def plan_text(plan: Plan) -> str:
    """What all ranks must agree on: mesh and every decision."""
    return repr((plan.mesh, [(d.kind, d.nodes, d.codes) for d in plan.decisions]))


def _check_materialised(model: nn.Module) -> None:
    meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if meta:
        raise StepError(
            f"{len(meta)} parameters are on the meta device ({meta[0]!r}, ...): they can be planned for but not trained. "
            "Materialise the model first: model.to_empty(device='cpu') and load or initialise its weights"
        )
