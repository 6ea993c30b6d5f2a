"""Gradient accumulation in plans: meshes in float64 within 1e-10 of the loop (`verify` runs it), every residency bit for bit against the
plan that keeps everything, and what the predictions say.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import test_parity as parity
import torch
from accumulating import ONE, STEPS, Deep, adamw, eager_loop, load
from torch import nn

import opweave as ow
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.capture_tree import map_tensors
from opweave.compiler.choices import build_choices
from opweave.compiler.lower import lower
from opweave.compiler.plan import to_assignment
from opweave.compiler.planner import plan_step
from opweave.compiler.record import possible
from opweave.compiler.residency import DISK, HOST, KEEP, ON_DEVICE, RECOMPUTE, StatePlace, Uses
from opweave.compiler.suggestions import what_would_fit
from opweave.compiler.timeline import timeline
from opweave.compiler.training_step import step_inputs
from opweave.compiler.trainings import computing_in
from opweave.cost_model.cluster import Cluster, Link
from opweave.runtime import collectives, micro_batches, tiers
from opweave.runtime.dry_run import dry_run
from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.sharding import unravel
from opweave.runtime.state import ProgramState

# -- meshes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mesh", "force", "clip"),
    [
        ("mlp-tiny", (2, 2), None, None), ("mlp-tiny", (4,), "zero2", 0.1), ("opt-tiny", (2,), None, 0.1),
        ("resnet-tiny", (2,), None, None), ("mixtral-tiny", (2,), None, None), ("tied", (2, 2), "zero3+megatron", None),
        ("tied", (2,), None, 0.1),
    ],
)  # fmt: skip
def test_meshes(name, mesh, force, clip):
    model, batch = load(name)
    report = ow.verify(model, batch, ranks=mesh, force=force, clip_grad_norm=clip, accumulate=2)
    assert report.holds and report.tolerance == 1e-10 and report.plan.accumulate == 2


@pytest.mark.slow
@pytest.mark.parametrize("force", [None, "zero1", "zero2", "zero3", "megatron_sp"])
@pytest.mark.parametrize("name", ["opt-tiny", "gpt2-tiny", "resnet-tiny", "mixtral-tiny"])
def test_every_recipe(name, force):
    model, batch = load(name)
    assert ow.verify(model, batch, ranks=(2, 2) if force is None else (2,), force=force, accumulate=2).holds


def in_double(name: str) -> tuple[nn.Module, Any, torch.optim.Optimizer, Any]:
    """(model, batch, optimizer, analysis) of two micro-batches, clipped."""
    model, batch = load(name)
    model, batch = model.double(), map_tensors(batch, lambda _, t: t.double() if t.is_floating_point() else t)
    optimizer = adamw(model, eps=1e-3)
    with computing_in(torch.float64):
        return model, batch, optimizer, analyse(capture(model, batch, optimizer=optimizer, clip_grad_norm=0.1, accumulate=2))


@pytest.mark.parametrize("name", ["mlp-tiny", "tied"])
def test_random_plans(name):
    """A random layout for everything: gradients exchanged before they are summed, behind it, or a bit of both."""
    model, batch, optimizer, analysis = in_double(name)
    found = []
    for mesh, seed in [((1,), 0), *itertools.product([(2,), (2, 2)], range(2))]:
        graph = build_choices(analysis.step, analysis.factors, mesh)
        assignment = to_assignment(graph, parity.random_selection(graph, random.Random(seed)))
        found.append(in_lockstep(model, batch, analysis, assignment, optimizer))
    (losses, expected), *others = found
    for other, values in others:
        assert other == pytest.approx(losses, rel=1e-10)
        assert max(parity.difference(values[key], expected[key]) for key in expected) < 1e-10


def slow_links(size: int) -> Cluster:
    cpu = Cluster.preset("cpu", devices=size)
    link = Link(latency_s=1e-3, bandwidth_bytes_per_s=1e8)
    return replace(cpu, intra_node=link, inter_node=link)


@functools.cache
def program_of(num: int) -> Any:
    """Data parallel over slow links."""
    model, batch = load("mlp-tiny")
    analysis = analyse(capture(model, batch, optimizer=adamw(model), accumulate=num))
    plan = plan_step(analysis, slow_links(2), mesh=(2,), force="ddp")
    return lower(analysis.step, analysis.factors, plan.assignment(analysis.step, analysis.factors), optimizer="AdamW"), plan


def test_gradients_are_exchanged_once_where_links_are_slow():
    """What DistributedDataParallel calls no_sync: nobody asked for it. (Each micro-batch exchanges the two scalars of its loss.)"""
    program, _ = program_of(4)
    end = micro_batches.end_of(program.graph)
    nodes = list(program.graph.nodes)
    starts = {nodes.index(node) > nodes.index(end): node for node in nodes if node.target in collectives.STARTS}
    assert starts.keys() == {False, True} and starts[True].target is collectives.all_reduce_bucket
    sums = [node for node in nodes if node.target is micro_batches.accumulate and node in starts[True].all_input_nodes]
    assert len(sums) == 6 == len(starts[True].all_input_nodes), "all gradients go in one message, behind the last micro-batch"
    model, batch = load("mlp-tiny")
    report = ow.verify(model, batch, ranks=(2,), force="ddp", cluster=slow_links(2), accumulate=4)
    assert report.collectives == {"all_reduce": 8, "all_reduce_bucket": 1}


def test_one_batch_has_no_loop():
    program, plan = program_of(1)
    assert micro_batches.end_of(program.graph) is None and program.num_micro_batches == 1 and plan.accumulate == 1
    assert not any(node.target is micro_batches.accumulate for node in program.graph.nodes)


# -- places ---------------------------------------------------------------------------------------------------------------

STATE_PLACES = (ON_DEVICE, StatePlace("device", HOST, "device"), StatePlace(DISK, DISK, "device"), StatePlace(HOST, HOST, HOST))


def in_lockstep(
    model: nn.Module, batch: Any, analysis: Any, assignment: Any, optimizer: torch.optim.Optimizer | None = None
) -> tuple[list[float], dict[Any, torch.Tensor]]:
    program = lower(analysis.step, analysis.factors, assignment, optimizer="AdamW")
    executor = LockstepExecutor(program, optimizer or adamw(model), account=True)
    executor.states = [
        ProgramState.from_model(program, model, unravel(rank, assignment.mesh), store=store) for rank, store in enumerate(executor.stores)
    ]
    losses = [float(executor.run(step_inputs(analysis, batch, 0, i))[0]) for i in range(STEPS)]
    return losses, {key: port.spec.unshard([state.value(key) for state in executor.states]) for key, port in program.stored.items()}


@pytest.mark.parametrize(("name", "mesh"), [("mlp-tiny", (1,)), ("mlp-tiny", (2, 2)), ("convnet-tiny", (2,))])
def test_random_places(name, mesh):
    model, batch = load(name)
    analysis = analyse(capture(model, batch, optimizer=adamw(model), accumulate=2))
    cheap = Link(latency_s=1e-9, bandwidth_bytes_per_s=1e12)
    cluster = replace(Cluster.preset("cpu", devices=math.prod(mesh)), intra_node=cheap, inter_node=cheap)
    plan, uses = plan_step(analysis, cluster, mesh=mesh), Uses(analysis.step)
    losses, expected = in_lockstep(model, batch, analysis, plan.assignment(analysis.step, analysis.factors))
    for seed in range(2):
        rng = random.Random(seed)
        mixed = plan.assignment(analysis.step, analysis.factors)
        mixed.early_updates = seed % 2 == 0
        places = {unit: rng.choice([KEEP, HOST, DISK, RECOMPUTE]) for unit in uses.units if unit not in uses.outputs}
        mixed.residency = {unit: place for unit, place in places.items() if place != KEEP}
        for param, _ in uses.parameters():
            place = rng.choice(STATE_PLACES)
            mixed.state[param] = possible(mixed, uses, param, place)
        found, values = in_lockstep(model, batch, analysis, mixed)
        assert found == losses and [key for key in expected if not torch.equal(values[key], expected[key])] == []


def test_a_scheduled_plan_within_limits_is_the_loop_bit_for_bit():
    """Fetches start early and copies are waited for late, but never across the end of a micro-batch."""
    model, batch = load("mlp-tiny")
    losses, expected = eager_loop(copy.deepcopy(model), batch, 2)
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=2, memory_limit="device=90000,disk=1GB").prepare(batch)
    nodes = list(step.program.graph.nodes)
    end = nodes.index(micro_batches.end_of(step.program.graph))
    waits = {node: node.args[0] for node in nodes if node.target in (tiers.settle, tiers.arrive)}
    assert step.plan.moves and {nodes.index(wait) > end for wait in waits} == {True, False}
    assert all((nodes.index(wait) > end) == (nodes.index(start) > end) for wait, start in waits.items())
    assert [float(step(batch)) for _ in range(STEPS)] == losses
    step.to_model()
    assert [n for n, value in model.state_dict().items() if not torch.equal(value, expected[n])] == []
    assert step.executor.memory.pools == step.plan.predicted["peak_bytes"]
    step.executor.close()


def all_updated_on_the_cpu(num: int) -> Any:
    """(model, batch, analysis, assignment) of one device whose parameters and state are all on the host."""
    model, batch = load("mlp-tiny")
    analysis = analyse(capture(model, batch, optimizer=adamw(model), accumulate=num))
    plan = plan_step(analysis, Cluster.resolve(ONE), mesh=(1,))
    assignment = plan.assignment(analysis.step, analysis.factors)
    assignment.state = {param: StatePlace(HOST, HOST, HOST) for param, _ in Uses(analysis.step).parameters()}
    return model, batch, analysis, assignment


@pytest.mark.parametrize("num_io_threads", [0, 2])
def test_gradients_add_up_where_they_are_used(num_io_threads):
    """Of parameters that the CPU updates the sums are on the host, and so are not on the device."""
    model, batch, analysis, assignment = all_updated_on_the_cpu(4)
    losses, expected = eager_loop(copy.deepcopy(model), batch, 4)
    program = lower(analysis.step, analysis.factors, assignment, optimizer="AdamW")
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(tiers.add_up) == len(list(model.parameters())) and targets.count(micro_batches.accumulate) == 1  # the loss
    executor = Executor(program, AxisGroups((1,)), optimizer=adamw(model), tiers=tiers.TierOptions(num_io_threads=num_io_threads))
    executor.state = ProgramState.from_model(program, model, (0,), store=executor.store)
    assert [float(executor.run(step_inputs(analysis, batch, 0, i))[0]) for i in range(STEPS)] == losses
    values = {fqn: executor.state.value((kind, fqn, slot)) for kind, fqn, slot in program.stored if kind == "param"}
    assert all(torch.equal(value, expected[fqn]) for fqn, value in values.items())
    on_paper = dry_run(lower(analysis.step, analysis.factors, assignment, device="meta", optimizer="AdamW"))
    assert executor.memory.pools == on_paper.pools
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert executor.memory.pools["host"] >= 4 * num_bytes > 2 * executor.memory.pools["device"], "parameters, two states and the sums"
    executor.close()


def test_narrow_gradients_travel_as_they_are():
    """Under autocast gradients are cast to float32 at the end: what is sent to a sum on the host is half as large, the sum the same."""
    torch.manual_seed(0)
    model, batch = Deep(), torch.randn(16, 16)
    analysis = analyse(capture(model, batch, optimizer=adamw(model), loss_fn=lambda m, b: m(b), autocast=torch.bfloat16, accumulate=4))
    plan = plan_step(analysis, Cluster.resolve(ONE), mesh=(1,))
    kept, sent = (plan.assignment(analysis.step, analysis.factors) for _ in range(2))
    sent.state = {param: StatePlace(HOST, HOST, HOST) for param, _ in Uses(analysis.step).parameters()}
    program = lower(analysis.step, analysis.factors, sent, optimizer="AdamW")
    offloads = [node.args[0] for node in program.graph.nodes if node.target is tiers.offload]
    adds = [node for node in program.graph.nodes if node.target is tiers.add_up]
    assert len(offloads) == len(adds) == 12 and all(node.args[1] is torch.float32 for node in adds)
    assert not any(str(node.target) == "aten._to_copy.default" and torch.float32 in node.kwargs.values() for node in offloads)
    losses, values = in_lockstep(model, batch, analysis, sent)
    expected = in_lockstep(model, batch, analysis, kept)
    assert losses == expected[0] and all(torch.equal(values[key], value) for key, value in expected[1].items())


def test_sums_on_the_host_are_planned():
    """A device that cannot hold the sums of the gradients beside the rest, on a machine whose CPU has room."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))), torch.randn(16, 256)
    given = {"optimizer": adamw(model), "loss_fn": lambda m, b: m(b).square().mean(), "accumulate": 4}
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    plan = ow.plan(model, "dgx-a100-640:1", batch, memory_limit=f"device={num_bytes},host=1GiB", **given)
    assert plan.predicted["peak_bytes"]["device"] <= num_bytes and plan.predicted["peak_bytes"]["host"] > 3.5 * num_bytes
    assert any("update host" in place for place in plan.state)


# -- memory and time ------------------------------------------------------------------------------------------------------


def deep(num: int) -> ow.TrainingStep:
    torch.manual_seed(0)
    model = Deep()
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=num, loss_fn=lambda m, b: m(b))
    step(torch.randn(512, 16))
    return step


def test_the_peak_falls_with_the_micro_batches():
    peaks = {num: deep(num).executor.memory.peak_bytes for num in (1, 4)}
    assert peaks[4] < 0.4 * peaks[1]


def test_a_model_fits_with_micro_batches_that_does_not_without():
    torch.manual_seed(0)
    model, batch = Deep(), torch.randn(512, 16)
    given = {"optimizer": adamw(model), "loss_fn": lambda m, b: m(b), "places": "keep"}
    need = ow.plan(model, ONE, batch, **given).predicted["peak_bytes"]["device"]
    with pytest.raises(ValueError, match="does not fit"):
        ow.plan(model, ONE, batch, memory_limit=need // 2, **given)
    assert ow.plan(model, ONE, batch, memory_limit=need // 2, accumulate=4, **given).predicted["peak_bytes"]["device"] <= need // 2
    found = what_would_fit(model, Cluster.resolve(ONE), batch, memory_limit=need // 2, **given)
    tried = {s.change: s for s in found.suggestions if s.change.startswith("--accumulate")}
    assert len(tried) == 3 and all(tried[f"--accumulate {k}: {k} micro-batches of {512 // k} samples"].fits for k in (4, 8))
    assert all(s.same_work_s == s.step_time_s for s in tried.values() if s.fits), "the batch is the same"


@pytest.mark.parametrize("name", ["mlp-tiny", "resnet-tiny"])
def test_the_dry_run_and_the_timeline_see_the_sums(name):
    model, batch = load(name)
    analysis = analyse(capture(model, batch, optimizer=adamw(model), accumulate=4))
    plan = plan_step(analysis, Cluster.preset("cpu", devices=1), mesh=(1,))
    assignment = plan.assignment(analysis.step, analysis.factors)
    on_paper = lower(analysis.step, analysis.factors, assignment, device="meta", optimizer="AdamW")
    line = timeline(on_paper, Cluster.preset("cpu", devices=1), device="meta")
    sums = [node for node in on_paper.graph.nodes if node.target is micro_batches.accumulate]
    params = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(b.num_bytes for b in line.resident if b.owner == "summed gradients") == params + 4  # and the loss
    assert {item.num_runs for item in line.instructions} == {1, 4} and len(sums) == len(list(model.parameters())) + 1
    assert line.simulate().peaks["device"].num_bytes == dry_run(on_paper).peak_bytes
    once = sum(item.seconds for item in line.instructions if item.num_runs == 1)
    each = sum(item.seconds for item in line.instructions if item.num_runs == 4)
    assert line.simulate().step_time_s == pytest.approx(4 * each + once)
