"""Gradient accumulation: a step of several micro-batches computes what the usual loop of backward passes before one update computes.

One device bit for bit in the models' own dtype, meshes in float64 within 1e-10 (`verify` runs the loop), every residency bit for bit
against the plan that keeps everything.
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
import torch.nn.functional as F
from torch import nn

import opweave as ow
from opweave import zoo
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture, default_loss
from opweave.compiler.capture_tree import map_tensors
from opweave.compiler.choices import build_choices
from opweave.compiler.lower import lower
from opweave.compiler.micro_batches import check_batch, micro_batch
from opweave.compiler.plan import Plan, PlanError, to_assignment
from opweave.compiler.planner import plan_step
from opweave.compiler.record import possible
from opweave.compiler.residency import DISK, HOST, KEEP, ON_DEVICE, RECOMPUTE, StatePlace, Uses
from opweave.compiler.suggestions import what_would_fit
from opweave.compiler.timeline import timeline
from opweave.compiler.training_step import NonFiniteLossError, step_inputs
from opweave.compiler.trainings import computing_in
from opweave.cost_model.cluster import Cluster, Link
from opweave.runtime import collectives, micro_batches, tiers
from opweave.runtime.dry_run import dry_run
from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.sharding import unravel
from opweave.runtime.state import ProgramState

STEPS = 3
ONE = "cpu:1"


class Tied(nn.Module):
    """A tied and a frozen weight, a gradient that is the batch itself, one that two parameters share, a counting buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.scale, self.a, self.b = nn.Parameter(torch.rand(4, 8)), nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = self.frozen(torch.tanh(self.hidden(self.embed(ids)))) + (self.a + self.b)
        loss = F.cross_entropy(self.out(x).flatten(0, 1), labels.flatten())
        return loss + (self.scale * weights.sum(0)).sum() + self.a.sum()


def tied() -> tuple[nn.Module, Any]:
    return Tied(), {"ids": torch.randint(16, (8, 4)), "labels": torch.randint(16, (8, 4)), "weights": torch.randn(8, 4, 8)}


class Shifting(nn.Module):
    """Keeps its last two inputs: the new value of one buffer is the old one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("before", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.before = self.last
        self.last = x.mean(0)
        return (self.layer(x) + self.before).square().mean()


class Deep(nn.Module):
    """Its activations outweigh its parameters by far."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.layer(x), 0.5, training=True).square().mean()


def load(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    own = {"tied": tied, "shifting": lambda: (Shifting(), {"x": torch.randn(8, 4)})}
    return own[name]() if name in own else zoo.load(name)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True, **options)


def eager_loop(model: nn.Module, batch: Any, num: int, clip: float | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What users write by hand."""
    optimizer = adamw(model)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for i in range(num):
            loss = default_loss(model, micro_batch(batch, num, i)) / num
            loss.backward()
            total = total + loss.detach()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        losses.append(float(total))
    return losses, dict(model.state_dict())


# -- one device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("name", ["mlp-tiny", "tied", "resnet-tiny", "shifting"])
def test_one_device_is_the_loop_bit_for_bit(name, num):
    model, batch = load(name)
    if next(iter(batch.values())).shape[0] % num:
        pytest.skip(f"the batch of {name} is not divisible by {num}")
    losses, expected = eager_loop(copy.deepcopy(model), batch, num)
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=num)
    assert [float(step(batch)) for _ in range(STEPS)] == losses
    step.to_model()
    assert [n for n, value in model.state_dict().items() if not torch.equal(value, expected[n])] == []
    assert step.executor.memory.peak_bytes == step.plan.predicted["peak_bytes"]["device"]


def test_gradients_without_an_optimizer_are_means():
    model, batch = load("tied")
    step = ow.compile(copy.deepcopy(model), ONE, accumulate=2).prepare(batch)
    outputs = step.executor.run(step_inputs(step.analysis, batch, 0, 0))
    for i in range(2):
        (default_loss(model, micro_batch(batch, 2, i)) / 2).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    fqns = [o.fqn for o in step.analysis.step.outputs if o.kind == "grad"]
    values = [v for v, o in zip(outputs, (o for o in step.analysis.step.outputs if o.kind != "buffer"), strict=True) if o.kind == "grad"]
    assert fqns and all(torch.equal(grads[fqn], value) for fqn, value in zip(fqns, values, strict=True))


def test_a_batch_is_never_written():
    """The gradient of `scale` is the batch itself: its sum must not begin in the user's memory."""
    model, batch = load("tied")
    before = {name: t.clone() for name, t in batch.items()}
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=4)
    step(batch)
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def test_one_bad_micro_batch_changes_no_parameter():
    model, batch = load("tied")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch["weights"][5] = math.nan
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=4)
    with pytest.raises(NonFiniteLossError, match="the loss of step 1 is nan"):
        step(batch)
    step.to_model()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_autocast():
    torch.manual_seed(0)
    model, batch = Deep(), torch.randn(8, 16)
    reference = copy.deepcopy(model)
    losses = []
    for part in batch.split(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(reference(part) / 2)
        losses[-1].backward()
    step = ow.compile(model, ONE, loss_fn=lambda m, b: m(b), autocast=torch.bfloat16, accumulate=2).prepare(batch)
    loss, *grads = step.executor.run(step_inputs(step.analysis, batch, 0, 0))
    assert torch.equal(loss, losses[0] + losses[1])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(reference.parameters(), grads, strict=True))


def test_dropout_differs_between_micro_batches_and_steps():
    torch.manual_seed(0)
    model = Dropped()
    batch = torch.randn(4, 32).repeat(2, 1)  # both halves are alike
    step = ow.compile(model, ONE, loss_fn=lambda m, b: m(b), optimizer=torch.optim.SGD(model.parameters(), lr=0.0), accumulate=2)
    losses = [float(step(batch)) for _ in range(3)]
    half = ow.compile(model, ONE, loss_fn=lambda m, b: m(b), optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    parts = [float(half(batch[:4])) for _ in range(6)]  # the same random numbers, one by one
    assert len(set(losses)) == 3 and len(set(parts)) == 6
    assert losses == pytest.approx([(parts[i] + parts[i + 1]) / 2 for i in (0, 2, 4)], rel=1e-6)


def test_extras_are_those_of_the_last_micro_batch():
    model = nn.Linear(8, 4)
    batch = torch.randn(8, 8)
    step = ow.compile(model, ONE, loss_fn=lambda m, b: (m(b).square().mean(), {"first": b[0, 0]}), accumulate=4)
    step(batch)
    assert step.extras[0]["first"] == batch[6, 0]


def test_an_extra_is_a_buffer_as_the_last_micro_batch_found_it():
    model, batch = load("shifting")

    def loss_of(model, batch):
        found = model.last
        return model(batch["x"]), found

    step = ow.compile(model, ONE, loss_fn=loss_of, accumulate=4)
    step(batch)
    assert torch.equal(step.extras[0], batch["x"][4:6].mean(0))


def test_a_plan_knows_its_micro_batches(tmp_path):
    model, batch = load("mlp-tiny")
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=2).prepare(batch)
    step.plan.save(tmp_path / "plan.json")
    again = ow.compile(model, ONE, optimizer=adamw(model), plan=tmp_path / "plan.json").prepare(batch)
    assert again.program.num_micro_batches == 2 and Plan.load(tmp_path / "plan.json").accumulate == 2
    with pytest.raises(PlanError, match="the plan was made for accumulate=2, this step has accumulate=4"):
        ow.compile(model, ONE, optimizer=adamw(model), plan=tmp_path / "plan.json", accumulate=4).prepare(batch)


# -- what cannot be cut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, -1, 2.0, "2", True])
def test_no_number_of_micro_batches(num):
    model, batch = load("mlp-tiny")
    with pytest.raises(ValueError, match=r"accumulate is .*; give the number of micro-batches of a step, a whole number from 1"):
        ow.plan(model, ONE, batch, accumulate=num)


def test_batches_that_cannot_be_cut():
    with pytest.raises(ValueError, match="accumulate=4 does not cut the batch of 6 samples into equal parts; 1, 2, 3, 6 would"):
        check_batch({"x": torch.ones(6, 2)}, 4)
    with pytest.raises(ValueError, match=r"'x' has 8 there and 'mask' has 3. Give what all samples share a first dim of 1"):
        check_batch({"x": torch.ones(8, 3), "mask": torch.ones(3, 3)}, 2)
    with pytest.raises(ValueError, match="no tensor of the batch has a first dim above 1"):
        check_batch({"x": torch.ones(1, 3), "scale": torch.tensor(2.0)}, 2)


def test_micro_batches_too_small_for_a_forced_plan():
    model, batch = load("mlp-tiny")
    with pytest.raises(ValueError, match=r"splits each of 8 micro-batches over 2 devices, but its size 1 .* give a batch of 16"):
        ow.plan(model, "cpu:2", batch, force="ddp", mesh=(2,), accumulate=8)


def test_what_all_samples_share_is_not_cut():
    batch = {"x": torch.ones(8, 3), "mask": torch.ones(1, 3, 3), "scale": torch.tensor(2.0), "name": "shared"}
    check_batch(batch, 4)
    part = micro_batch(batch, 4, 3)
    assert part["x"].shape == (2, 3) and part["mask"] is batch["mask"] and part["scale"] is batch["scale"] and part["name"] == "shared"
    assert part["x"].data_ptr() == batch["x"][6:].data_ptr()


def test_a_later_batch_of_another_size_is_refused():
    model, batch = load("mlp-tiny")
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=2)
    step(batch)
    size = batch["x"].shape[0] if "x" in batch else next(iter(batch.values())).shape[0]
    with pytest.raises(ValueError, match="does not cut the batch"):
        step({name: t[: size - 1] for name, t in batch.items()})


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
