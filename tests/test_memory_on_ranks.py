"""Predicted peaks on several ranks, the buffers of collectives among them, are those of the executor, to the byte.

In one process by the executor of the last rank on paper (`PaperGroups`), which computes on zeros where messages would arrive; and in real
jobs, by `memory_worker`.
"""

import math
from pathlib import Path

import pytest
import torch

import opweave as ow
from opweave import zoo
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.lower import lower
from opweave.compiler.training_step import step_inputs
from opweave.runtime.execute import Executor
from opweave.runtime.groups import PaperGroups
from opweave.runtime.program import shard_inputs
from opweave.runtime.state import ProgramState
from opweave.runtime.tiers import TierOptions

from .runtime.launch import launch

WORKER = Path(__file__).parent / "workers" / "memory_worker.py"
PLANS = [
    ("mlp-tiny", None, (2,)), ("opt-tiny", "zero3", (2,)), ("gpt2-tiny", "ddp", (2, 2)), ("mixtral-tiny", "megatron", (2,)),
    ("resnet-tiny", "zero1", (2, 2)), ("llama-tiny", "zero2+megatron_sp", (2, 2)), ("vit-tiny", None, (2, 2)),
]  # fmt: skip


def on_paper(plan, model, batch, optimizer, folder, limit=None):
    """The account of the last rank's first step."""
    analysis = analyse(capture(model, batch, optimizer=optimizer))
    program = lower(analysis.step, analysis.factors, plan.assignment(analysis.step, analysis.factors), optimizer=type(optimizer).__name__)
    groups = PaperGroups(plan.mesh)
    executor = Executor(program, groups, optimizer=optimizer, limit_bytes=limit, tiers=TierOptions(disk_path=folder))
    executor.state = ProgramState.from_model(program, model, groups.coords, store=executor.store)
    executor.run({name: piece.clone() for name, piece in shard_inputs(program, step_inputs(analysis, batch, 0, 0), groups.coords).items()})
    executor.close()
    return executor.memory


@pytest.mark.parametrize(("name", "force", "mesh"), PLANS)
def test_peaks_are_those_of_the_last_rank(name, force, mesh, tmp_path):
    model, batch = zoo.load(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    cluster = ow.Cluster.preset("cpu", devices=math.prod(mesh))
    plan = ow.plan(model, cluster, batch, optimizer=optimizer, mesh=mesh, force=force)
    assert on_paper(plan, model, batch, optimizer, tmp_path).pools == plan.predicted["peak_bytes"]


def test_a_limit_on_two_ranks_holds_with_its_buffers(tmp_path):
    model, batch = zoo.load("mlp-tiny")
    optimizer = torch.optim.AdamW(model.parameters())
    cluster = ow.Cluster.preset("cpu", devices=2)
    whole = ow.plan(model, cluster, batch, optimizer=optimizer).predicted["peak_bytes"]["device"]
    limit = {"device": int(0.45 * whole), "disk": 10**9}
    plan = ow.plan(model, cluster, batch, optimizer=optimizer, memory_limit=limit)
    pools = on_paper(plan, model, batch, optimizer, tmp_path, limit).pools
    assert pools == plan.predicted["peak_bytes"] and pools["disk"] > 0


def job(rows, folder, num_ranks):
    """Runs rows of `memory_worker`; every rank must have found every prediction right."""
    output = launch(str(WORKER), ",".join(rows), str(folder), num_ranks=num_ranks, timeout_s=280)
    assert output.count("memory ok") == num_ranks, output
    assert output.count(" bytes") == sum(1 if row.endswith(":1") else 2 for row in rows), output


def test_two_real_ranks(tmp_path):
    job(["mlp-tiny::2:0.6"], tmp_path, 2)


@pytest.mark.slow
def test_two_real_ranks_with_more_plans(tmp_path):
    """The solver's at three limits, and others."""
    rows = ["mlp-tiny::2:0.75", "mlp-tiny::2:0.5", "mlp-tiny::2:0.35", "mlp-tiny:ddp:2:0.7", "opt-tiny:zero3:2:0.8", "vit-tiny::2:0.7"]
    job([*rows, "mixtral-tiny:megatron:2:1"], tmp_path, 2)


@pytest.mark.slow
def test_four_real_ranks(tmp_path):
    job(["mlp-tiny:zero3:2x2:0.8", "llama-tiny:zero3+megatron:2x2:1", "opt-tiny::2x2:1", "resnet-tiny:ddp:2x2:1"], tmp_path, 4)
