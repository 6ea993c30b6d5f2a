"""The simulated program against the executor: the same bytes at the peak, sensible seconds, collectives where they are."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import opweave as ow
from opweave import zoo
from opweave.compiler import api
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.lower import lower
from opweave.compiler.plan import PlanError
from opweave.compiler.planner import plan_step
from opweave.compiler.timeline import _fake_values, _tensors, _Writer, timeline, timeline_of_plan
from opweave.compiler.training_step import step_inputs
from opweave.cost_model.collectives import KINDS, SPACING
from opweave.runtime import collectives
from opweave.runtime.communicator import DirectTransport
from opweave.runtime.execute import Executor
from opweave.runtime.groups import PaperGroups
from opweave.runtime.program import shard_inputs
from opweave.runtime.state import ProgramState


def _lowered(name, mesh, force, *, scheduled=True):
    model, batch = zoo.resolve(name)
    optimizer = torch.optim.AdamW(model.parameters())
    cluster = ow.Cluster.preset("cpu", devices=math.prod(mesh))
    plan = api.plan(model, cluster, batch, optimizer=optimizer, mesh=mesh, force=force)
    analysis = analyse(capture(model, batch, optimizer=optimizer))
    assignment = plan.assignment(analysis.step, analysis.factors)
    if not scheduled:
        assignment.moves = []
    program = lower(analysis.step, analysis.factors, assignment, optimizer="AdamW")
    return program, cluster, (model, batch, optimizer, plan, analysis)


def _measured(program, model, batch, optimizer, analysis):
    groups = PaperGroups(program.mesh)
    state = ProgramState.from_model(program, model, groups.coords)
    executor = Executor(program, groups, optimizer=optimizer, state=state)
    executor.run({name: piece.clone() for name, piece in shard_inputs(program, step_inputs(analysis, batch, 0, 0), groups.coords).items()})
    return executor.memory.peak_bytes


@pytest.mark.parametrize(
    "name, mesh, force, tolerance", [("opt-tiny", (2, 2), None, 0), ("resnet-tiny", (2,), "ddp", 0), ("gpt2-tiny", (2,), "zero3", 0.1)]
)
def test_simulated_peak_is_the_executors(name, mesh, force, tolerance):
    # As lowered: what is gathered early has its memory when it is issued, in the simulation when its stream comes to it.
    program, cluster, (model, batch, optimizer, _, analysis) = _lowered(name, mesh, force, scheduled=False)
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


def test_a_reshape_that_copies_is_no_view():
    program, cluster, _ = _lowered("gpt2-tiny", (2,), "ddp")
    copies = [i for i in timeline(program, cluster).instructions if i.name.startswith(("reshape", "clone")) and i.op_class == "copy"]
    assert copies and all(i.seconds > cluster.device.view_s and i.allocs for i in copies)


def test_collectives_pay_for_bringing_tensors_into_pieces():
    """A gather along the first dim needs no rearranging; along another all that arrives is copied; buckets are packed."""
    program, cluster, _ = _lowered("opt-tiny", (2,), "zero3")
    writer = _Writer(program, cluster, _fake_values(program, cluster, "cpu"))
    starts = [n for n in program.graph.nodes if n.op == "call_function" and n.target in collectives.STARTS]
    gathers = [n for n in starts if n.target is collectives.all_gather]
    assert gathers
    for node in gathers:
        wait = next(iter(node.users))
        whole = sum(t.numel() * t.element_size() for t in _tensors(writer.values[wait]))
        apart = math.prod(writer.values[node.args[0]].shape[: node.args[2]]) * node.args[3] > 1
        assert writer._rearranged(node) == (0, whole if apart else 0)
    bucket = next(n for n in starts if n.target is collectives.reduce_scatter_bucket)
    assert writer._rearranged(bucket)[0] >= sum(writer.values[x].numel() * 4 for x in bucket.args[0])


def test_a_plan_of_another_model_is_refused():
    _, cluster, (_, _, _, plan, _) = _lowered("opt-tiny", (2,), "ddp")
    other, batch = zoo.resolve("gpt2-tiny")
    with pytest.raises(PlanError, match="the plan was made for"):
        timeline_of_plan(plan, other, batch, cluster, optimizer=torch.optim.AdamW(other.parameters()))


def test_no_more_than_a_few_buckets_of_gradients_are_under_way():
    """Each holds its memory until it is waited for, which is done in the backward pass once more than four are behind it."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(24)))
    batch = (torch.randn(8, 256),)
    made = {"loss_fn": lambda m, b: m(*b).pow(2).mean(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    plan = api.plan(model, ow.Cluster.preset("cpu", devices=2), batch, mesh=(2,), force="zero2", **made)
    analysis = analyse(capture(model, batch, **made))
    program = lower(analysis.step, analysis.factors, plan.assignment(analysis.step, analysis.factors), bucket_bytes=256 * 256 * 4)
    under_way, most = set(), 0
    for node in program.graph.nodes:
        if node.target in (collectives.reduce_scatter, collectives.reduce_scatter_bucket):
            under_way.add(node)
        elif node.target is collectives.wait:
            under_way -= set(node.args)
        most = max(most, len(under_way))
    assert 2 <= most <= 6


def test_large_tensors_of_a_bucket_are_messages_of_their_own():
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    batch = (torch.randn(8, 512),)
    made = {"loss_fn": lambda m, b: m(*b).pow(2).mean(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    analysis, large, small = analyse(capture(model, batch, **made)), 512 * 512 * 4, 512 * 4
    for devices, alone, copied in ((2, [large, large], 2 * small), (4, [], 0)):
        cluster = ow.Cluster.preset("cpu", devices=devices)
        plan = api.plan(model, cluster, batch, mesh=(devices,), force="ddp", **made)
        program = lower(analysis.step, analysis.factors, plan.assignment(analysis.step, analysis.factors), optimizer="SGD")
        writer = _Writer(program, cluster, _fake_values(program, cluster, "cpu"))
        bucket = next(n for n in program.graph.nodes if n.target is collectives.all_reduce_bucket)
        solo, packed = writer._messages(bucket, DirectTransport.solo_bytes("all_reduce", devices))
        assert solo == alone and sum(solo) + sum(packed) == 2 * (large + small)
        assert writer._rearranged(bucket) == (copied, 0), "with more than two devices packing is the copy that gloo needs anyway"


def _planned_beside_experts(added):
    """Plans of one model by recipe, on two devices whose messages are cheap but take `added` on top behind a computation."""
    model, batch = zoo.load("opt-tiny")
    analysis = analyse(capture(model, batch, optimizer=torch.optim.AdamW(model.parameters())))
    plain = ow.Cluster.preset("cpu", devices=2)
    tables = {kind: {"2": [[1.0, 1e-9], [1e9, 1e-6]]} for kind in KINDS} | {SPACING: {"2": [[0.0, 0.0], [1e-7, added]]}}
    cluster = dataclasses.replace(plain, intra_node=dataclasses.replace(plain.intra_node, tables=tables))
    return {force: plan_step(analysis, cluster, mesh=(2,), force=force) for force in (None, "ddp", "megatron")}


def test_experts_are_simulated_where_collectives_cost_what_lies_between_them():
    """The sum of costs sees cheap messages; every one between two computations takes a tenth of a second on top."""
    plans = _planned_beside_experts(0.1)
    times = {force: plan.predicted["step_time_s"] for force, plan in plans.items()}
    assert times[None] <= min(times["ddp"], times["megatron"]) < max(times.values())
    proof, objectives = plans[None].solver, [c["objective_s"] for c in plans[None].candidates]
    assert len(objectives) == 3 and proof["lower_bound_s"] <= min(objectives) < proof["objective_s"], "it is about all plans of the mesh"


def test_own_plans_have_to_beat_experts_by_a_margin(monkeypatch):
    def times(margin):
        monkeypatch.setattr("opweave.compiler.planner._EXPERTS_MARGIN", margin)
        return {force: plan.predicted["step_time_s"] for force, plan in _planned_beside_experts(0.0).items()}

    free = times(0.0)
    best = min(free["ddp"], free["megatron"])
    gain = 1 - free[None] / best
    assert gain > 0.01
    assert times(0.9 * gain)[None] == free[None] and times(1.1 * gain)[None] == best


def test_collectives_cost_what_lies_between_them():
    program, cluster, _ = _lowered("opt-tiny", (2,), "zero3")

    def seconds(added):
        tables = {kind: {"2": [[1.0, 1e-3], [1e9, 1e-3]]} for kind in KINDS} | {SPACING: {"2": added}}
        priced = dataclasses.replace(cluster, intra_node=dataclasses.replace(cluster.intra_node, tables=tables))
        return [i for i in timeline(program, priced).instructions if i.stream == "collectives"]

    usual, behind, none = seconds([[0.0, 0.0], [1.0, 0.0]]), seconds([[0.0, -5e-4], [1e-12, 0.0]]), seconds([[0.0, -1.0], [1.0, -1.0]])
    less = [a.seconds - b.seconds for a, b in zip(usual, behind, strict=True)]
    assert less[0] == pytest.approx(5e-4), "nothing was computed before the first"
    assert 0 < sum(x > 1e-9 for x in less) < len(less), "others have computation between them"
    assert all(i.seconds >= 0 for i in none)
