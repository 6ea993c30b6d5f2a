"""The simulated program against the executor: the same bytes at the peak, sensible seconds, collectives where they are."""

import math

import opweave as ow
import pytest
import torch
from opweave import zoo
from opweave.compiler import api
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.lower import lower
from opweave.compiler.plan import PlanError
from opweave.compiler.timeline import timeline, timeline_of_plan
from opweave.compiler.training_step import step_inputs
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.sharding import unravel
from opweave.runtime.state import ProgramState


def _lowered(name, mesh, force):
    model, batch = zoo.resolve(name)
    optimizer = torch.optim.AdamW(model.parameters())
    cluster = ow.Cluster.preset("cpu", devices=math.prod(mesh))
    plan = api.plan(model, cluster, batch, optimizer=optimizer, mesh=mesh, force=force)
    analysis = analyse(capture(model, batch, optimizer=optimizer))
    program = lower(analysis.step, analysis.factors, plan.assignment(analysis.step, analysis.factors), optimizer="AdamW")
    return program, cluster, (model, batch, optimizer, plan, analysis)


def _measured(program, model, batch, optimizer, analysis):
    executor = LockstepExecutor(program, optimizer, account=True)
    ranks = range(math.prod(program.mesh))
    executor.states = [ProgramState.from_model(program, model, unravel(rank, program.mesh)) for rank in ranks]
    executor.run(step_inputs(analysis, batch, 0, 0))
    return executor.memory.peak_bytes


@pytest.mark.parametrize(
    "name, mesh, force, tolerance", [("opt-tiny", (2, 2), None, 0), ("resnet-tiny", (2,), "ddp", 0), ("gpt2-tiny", (2,), "zero3", 0.1)]
)
def test_simulated_peak_is_the_executors(name, mesh, force, tolerance):
    program, cluster, (model, batch, optimizer, _, analysis) = _lowered(name, mesh, force)
    peak = timeline(program, cluster).simulate().peaks["device"].num_bytes
    assert peak == pytest.approx(_measured(program, model, batch, optimizer, analysis), rel=tolerance, abs=0)


def test_seconds_and_streams():
    program, cluster, _ = _lowered("opt-tiny", (2,), "ddp")
    made = timeline(program, cluster)
    result = made.simulate()
    assert set(result.busy_s) == {"compute", "collectives"}
    assert result.step_time_s >= max(result.busy_s.values())
    assert result.step_time_s <= sum(i.seconds for i in made.instructions) * 1.001
    classes = {i.op_class for i in made.instructions}
    assert {"matmul", "attention", "attention_backward", "norm", "update", "all_reduce"} <= classes and "other" not in classes


def test_a_plan_of_another_model_is_refused():
    _, cluster, (_, _, _, plan, _) = _lowered("opt-tiny", (2,), "ddp")
    other, batch = zoo.resolve("gpt2-tiny")
    with pytest.raises(PlanError, match="the plan was made for"):
        timeline_of_plan(plan, other, batch, cluster, optimizer=torch.optim.AdamW(other.parameters()))
