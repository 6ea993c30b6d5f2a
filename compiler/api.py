"""The pipeline on one screen: model + batch → StepGraph → Analysis → Plan → LocalProgram → running step.

capture     compiler/capture.py    model, batch              → StepGraph
analyse     compiler/analyse.py    StepGraph                 → Analysis (rules, factors)
plan_step   compiler/planner.py    Analysis, Cluster         → Plan (choices, prices, solver)
lower       compiler/lower.py      Analysis, Assignment      → LocalProgram
execute     runtime/execute.py     LocalProgram, state       → loss
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from ..cost_model.cluster import Cluster
from ..cost_model.energy import check
from ..runtime.groups import join_job, on_first_rank
from .analyse import Analysis, analyse
from .capture import LossFn, capture
from .micro_batches import micro_batches_asked
from .plan import Plan
from .planner import plan_step
from .training_step import StepOptions, TrainingStep
from .verify import VerifyReport, verify

__all__ = ["Plan", "TrainingStep", "VerifyReport", "compile", "plan", "verify"]


def compile(
    model: nn.Module,
    cluster: Cluster | str | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    clip_grad_norm: float | None = None,
    autocast: torch.dtype | None = None,
    accumulate: int | None = None,
    mesh: tuple[int, ...] | None = None,
    force: str | None = None,
    memory_limit: Any = None,
    places: str = "auto",
    objective: str = "time",
    disk_path: str | os.PathLike[str] | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str | None = None,
    keep_model: bool = True,
) -> TrainingStep:
    """Make `model` a planned training step: `step = compile(model, cluster, optimizer=...)`, then `loss = step(batch)`.

    cluster: a Cluster, the name of a preset or a file (default: this machine, one device per rank). optimizer: torch's SGD, Adam or
    AdamW. loss_fn(model, batch): the loss, or (loss, extras...); default: the model's own. clip_grad_norm: max_norm. autocast: dtype of the
    forward pass. accumulate: the number of micro-batches the batch is cut into along its first dim; each runs forward and backward, their
    gradients are averaged, then comes one update (default: the plan's, else 1; see `compiler.micro_batches`). mesh: devices per mesh axis
    (default: the planner chooses). force: an expert's recipe ("ddp", "zero3", "megatron", ...; see `compiler.force`). memory_limit: bytes
    per device, or per pool: "device=4GiB,host=32GiB,disk=100GiB" (see `compiler.limits`). places: a recipe of others for what lives where
    ("keep", "checkpoint", "offload-all", ...; see `compiler.place_recipes`). objective: what is minimised, "time", "cost" (price) or
    "energy", from figures of the cluster (see `cost_model.energy`). disk_path: folder for what the plan puts on disk (default: the
    system's temporary one). plan: run this plan (or the one in this file) instead of making one; its autocast is taken from it.
    seed: of dropout. keep_model: the model's own tensors stay as they are until `to_model()`; with False the step takes them over, which
    saves a copy of the parameters: those a rank holds whole train in place, the others are empty until `to_model()`.

    Raises ValueError (or a named subclass) for what the user can mend; the text says how.
    """
    loaded = Plan.load(plan) if isinstance(plan, (str, os.PathLike)) else plan
    if loaded is not None and autocast is None:
        autocast = loaded.autocast_dtype
    options = StepOptions(
        loss_fn=loss_fn, optimizer=optimizer, clip_grad_norm=clip_grad_norm, autocast=autocast,
        accumulate=micro_batches_asked(accumulate, loaded), mesh=mesh, force=force, memory_limit=memory_limit, places=places,
        objective=objective, disk_path=disk_path, plan=loaded, seed=seed, device=device, cluster_given=cluster is not None,
        keep_model=keep_model,
    )  # fmt: skip
    where = resolve_cluster(cluster)
    if loaded is None:
        check(objective, where)
    return TrainingStep(model, where, options, _make)


def plan(
    model: nn.Module,
    cluster: Cluster | str | None,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    clip_grad_norm: float | None = None,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    mesh: tuple[int, ...] | None = None,
    force: str | None = None,
    memory_limit: Any = None,
    places: str = "auto",
    objective: str = "time",
    time_limit_s: float = 60.0,
) -> Plan:
    """Plan without running: no GPU and no process group, and a model on the meta device is enough. Arguments as for `compile`."""
    where = resolve_cluster(cluster)
    check(objective, where)
    analysis, seconds = _analysed(model, batch, loss_fn, optimizer, clip_grad_norm, autocast, accumulate)
    return plan_step(
        analysis, where, mesh=mesh, force=force, memory_limit=memory_limit, places=places, objective=objective,
        time_limit_s=time_limit_s, capture_s=seconds,
    )  # fmt: skip


def _make(step: TrainingStep, batch: Any) -> None:
    """Capture, plan (unless a plan was given) and install."""
    o = step.options
    join_job(step.device.type)
    analysis, seconds = _analysed(step.model, batch, o.loss_fn, o.optimizer, o.clip_grad_norm, o.autocast, o.accumulate)
    if o.plan is not None:
        o.plan.check(analysis.step, step.cluster if o.cluster_given else None)
        step.install(analysis, o.plan)
        return

    def make() -> dict[str, Any]:
        made = plan_step(
            analysis, step.cluster, mesh=o.mesh, force=o.force, memory_limit=o.memory_limit, places=o.places, objective=o.objective,
            time_limit_s=o.time_limit_s, capture_s=seconds,
        )  # fmt: skip
        return made.to_dict()

    # One rank plans for all: the solver has a time limit, so two of them need not end at the same plan.
    step.install(analysis, Plan.from_dict(on_first_rank(make)))


def _analysed(
    model: nn.Module, batch: Any, loss_fn: LossFn | None, optimizer: torch.optim.Optimizer | None, clip: float | None,
    autocast: torch.dtype | None, accumulate: int,
) -> tuple[Analysis, float]:  # fmt: skip
    started = time.perf_counter()
    step = capture(model, batch, loss_fn=loss_fn, optimizer=optimizer, clip_grad_norm=clip, autocast=autocast, accumulate=accumulate)
    analysis = analyse(step)
    return analysis, time.perf_counter() - started


def resolve_cluster(cluster: Cluster | str | None) -> Cluster:
    """A cluster from itself, a preset's name, a file, or this machine."""
    if cluster is None:
        return Cluster.detect()
    if isinstance(cluster, (str, os.PathLike)):
        return Cluster.resolve(os.fspath(cluster))
    if not isinstance(cluster, Cluster):
        raise ValueError(f"cluster is {cluster!r}; give a Cluster, the name of a preset, or the path of a cluster file")
    return cluster
