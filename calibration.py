"""Calibration with the runtime's own collectives: what `opweave calibrate` runs, alone or under torchrun.

`cost_model.calibrate` measures and fits but knows no runtime; here the two meet.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from .cost_model.calibrate import Options, Progress, calibrate
from .cost_model.calibrate_check import check
from .cost_model.cluster import Cluster
from .cost_model.measure import Functions
from .cost_model.measure_rows import Update
from .host_memory import keep_freed_memory
from .runtime import ops as _ops  # noqa: F401  defines the ops of our own that are measured
from .runtime.batch_norm import channel_moments
from .runtime.collectives import wait
from .runtime.communicator import Communicator
from .runtime.groups import AxisGroups
from .runtime.update import Updater


class Wires:
    """One group's collectives, as calibration asks for them: flat tensors in, whatever comes out is not looked at."""

    def __init__(self, mesh: tuple[int, ...], axes: tuple[int, ...]) -> None:
        groups = AxisGroups(mesh)
        groups.prepare([axes])
        self.axes = axes
        self.size = groups.group(axes).size
        self.communicator = Communicator(groups)

    def start(self, kind: str, tensor: torch.Tensor) -> Any:
        """Begin a collective. all_gather and all_to_all take this rank's piece, the others the whole tensor."""
        made = self.communicator
        if kind == "all_reduce":
            return made.all_reduce(tensor, self.axes)
        if kind == "all_gather":
            return made.all_gather(tensor, self.axes, 0, 1)
        if kind == "reduce_scatter":
            return made.reduce_scatter(tensor, self.axes, 0, 1)
        assert kind == "all_to_all", f"no collective {kind}"
        return made.all_to_all(tensor.view(self.size, -1), self.axes, 0, 1, 1, 1)

    def wait(self, pending: Any) -> Any:
        return wait(pending)


def join_job() -> int:
    """Join the job torchrun started, if there is one; returns this rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank() if dist.is_initialized() else 0


def _connect() -> Any:
    return Wires if dist.is_initialized() and dist.get_world_size() > 1 else None


def runtime_functions() -> Functions:
    """The runtime's own ops. AdamW as an executor runs it: with its checks and counts, which for small parameters outlast the kernel."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    updater, names, loss = Updater({}, optimizer, "AdamW"), [f"parameter{i}" for i in range(64)], torch.zeros(())

    def update(made: Update) -> None:
        updater.fused_update(made.params, made.grads, made.states, "AdamW", 0, names[: len(made.params)], loss)

    return {"opweave.update": update, "opweave.channel_moments": channel_moments}


def calibrate_here(output: str | os.PathLike[str] | None, options: Options, progress: Progress | None = None) -> Cluster:
    """`cost_model.calibrate.calibrate` on this job's ranks, in the state in which a step finds the process."""
    keep_freed_memory()
    return calibrate(output, connect=_connect(), functions=runtime_functions(), options=options, progress=progress)


def check_here(cluster: Cluster) -> dict[str, Any]:
    """`cost_model.calibrate_check.check` on this job's ranks."""
    keep_freed_memory()
    return check(cluster, connect=_connect(), functions=runtime_functions())
