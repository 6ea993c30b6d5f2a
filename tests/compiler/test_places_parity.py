"""Where tensors live does not change what a step computes: no residency, no place of state, no order of updates.

Every choice alone for all that it can be said of, and random mixes of all of them, in lockstep against the plan that keeps everything on
the device: losses, parameters, buffers and optimizer state after three steps are the same bits.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opweave import zoo
from opweave.compiler.analyse import Analysis, analyse
from opweave.compiler.capture import capture
from opweave.compiler.lower import Assignment, lower
from opweave.compiler.plan import Plan
from opweave.compiler.planner import plan_step
from opweave.compiler.record import possible
from opweave.compiler.residency import DISK, HOST, KEEP, ON_DEVICE, RECOMPUTE, SMALL_BYTES, StatePlace, Uses, results
from opweave.compiler.training_step import step_inputs
from opweave.cost_model.cluster import Cluster, Link
from opweave.runtime import tiers
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.memory import MemoryReport
from opweave.runtime.program import LocalProgram
from opweave.runtime.sharding import unravel
from opweave.runtime.state import ProgramState

STEPS = 3
FAMILIES = [name for name in zoo.names() if name.endswith("-tiny")]
MESHES = [(1,), (2,), (2, 2)]
STATE_PLACES = (
    ON_DEVICE, StatePlace("device", HOST, "device"), StatePlace("device", DISK, "device"), StatePlace(DISK, DISK, "device"),
    StatePlace(HOST, DISK, "device"), StatePlace(HOST, HOST, HOST),
)  # fmt: skip
Key = tuple[str, str, str]


class Dropped(nn.Module):
    """Two layers with dropout behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 32)])
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.dropout(F.gelu(layer(x)), 0.3, training=self.training)
        return F.cross_entropy(self.head(x), labels)


def dropped() -> tuple[nn.Module, Any]:
    return Dropped().train(), {"x": torch.randn(64, 32), "labels": torch.randint(8, (64,))}


def gpt2_with_dropout() -> tuple[nn.Module, Any]:
    import transformers

    row = zoo.row("gpt2-tiny")
    config = transformers.GPT2Config(**row.kwargs | {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1})
    model = transformers.GPT2LMHeadModel(config).train()
    return model, row.make_batch(row, model, row.batch)


DROPOUT = {"dropped": dropped, "gpt2 with dropout": gpt2_with_dropout}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True),
}


@dataclass(frozen=True)
class Case:
    """A model with its step, and what the plan that keeps everything computes on a mesh."""

    model: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer
    analysis: Analysis
    plan: Plan
    uses: Uses
    expected: Result

    def assignment(self) -> Assignment:
        """The plan that keeps everything; a fresh one each time, to be changed."""
        return self.plan.assignment(self.analysis.step, self.analysis.factors)


@dataclass(frozen=True)
class Result:
    """Of some steps: losses, whole stored tensors by key, memory of rank 0 in the last step, bytes its tiers copied."""

    losses: list[float]
    values: dict[Key, torch.Tensor]
    memory: MemoryReport
    copied: tuple[int, int]
    program: LocalProgram


@functools.cache
def case(
    name: str, mesh: tuple[int, ...], clip: float | None = None, optimizer: str = "adamw", autocast: torch.dtype | None = None
) -> Case:  # fmt: skip
    torch.manual_seed(0)
    model, batch = DROPOUT[name]() if name in DROPOUT else zoo.load(name)
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    analysis = analyse(capture(model, batch, optimizer=made, clip_grad_norm=clip, autocast=autocast))
    plan = _plan(analysis, mesh)
    expected = run(model, batch, made, analysis, plan.assignment(analysis.step, analysis.factors))
    return Case(model, batch, made, analysis, plan, Uses(analysis.step), expected)


def _plan(analysis: Analysis, mesh: tuple[int, ...]) -> Plan:
    cpu = Cluster.preset("cpu", devices=math.prod(mesh))
    link = Link(latency_s=1e-9, bandwidth_bytes_per_s=1e12)  # so that tiny models are split
    return plan_step(analysis, replace(cpu, intra_node=link, inter_node=link, device=replace(cpu.device, launch_s=0.0)), mesh=mesh)


def run(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, analysis: Analysis, assignment: Assignment) -> Result:
    program = lower(analysis.step, analysis.factors, assignment, optimizer=type(optimizer).__name__)
    executor = LockstepExecutor(program, optimizer, account=True)
    executor.states = [
        ProgramState.from_model(program, model, unravel(rank, assignment.mesh), store=store) for rank, store in enumerate(executor.stores)
    ]
    before = executor.stores[0].copied
    losses = [float(executor.run(step_inputs(analysis, batch, 0, i))[0]) for i in range(STEPS)]
    after = executor.stores[0].copied
    values = {key: port.spec.unshard([state.value(key) for state in executor.states]) for key, port in program.stored.items()}
    return Result(losses, values, executor.memory, (after[0] - before[0], after[1] - before[1]), program)


def assert_same(c: Case, assignment: Assignment) -> Result:
    """Run an assignment; every number must be that of the plan that keeps all."""
    result = run(c.model, c.batch, c.optimizer, c.analysis, assignment)
    assert result.losses == c.expected.losses
    assert result.values.keys() == c.expected.values.keys()
    assert [key for key, value in result.values.items() if not torch.equal(value, c.expected.values[key])] == []
    return result


def everywhere(c: Case, place: str) -> Assignment:
    """All results of the forward pass in one place."""
    out = c.assignment()
    out.residency = {unit: place for unit in c.uses.units if unit not in c.uses.outputs}
    return out


def mixed(c: Case, seed: int) -> Assignment:
    """A random place for every result and every parameter; updates early or late."""
    rng = random.Random(seed)
    out = c.assignment()
    choices = {unit: rng.choice([KEEP, HOST, DISK, RECOMPUTE, RECOMPUTE]) for unit in c.uses.units if unit not in c.uses.outputs}
    out.residency = {unit: place for unit, place in choices.items() if place != KEEP}
    for param, _ in c.uses.parameters():
        place = rng.choice(STATE_PLACES)
        out.state[param] = possible(out, c.uses, param, place)
    out.early_updates = rng.random() < 0.7
    return out


def assert_forced(c: Case, place: str) -> None:
    result = assert_same(c, everywhere(c, place))
    if place == RECOMPUTE:
        # No claim on the peak: operands that are kept for nobody else may be there once more when all is made again.
        assert result.program.num_recomputed > 0, "nothing was made again"
        assert result.copied == (0, 0)
        return
    largest = max(v.meta["val"].numel() * v.meta["val"].element_size() for u in c.uses.units if u not in c.uses.outputs for v in results(u))
    if largest < SMALL_BYTES:
        assert result.copied == (0, 0), "what is too small to be worth a copy was copied"
    else:
        assert result.copied[0] > 0 and result.copied[1] > 0 and result.memory.pools[place] > 0, "nothing was copied"
    assert result.memory.pools["device"] <= c.expected.memory.pools["device"]


def assert_state(c: Case, place: StatePlace) -> None:
    for early in (False, True):
        out = c.assignment()
        out.state = {param: possible(out, c.uses, param, place) for param, _ in c.uses.parameters()}
        out.early_updates = early
        result = assert_same(c, out)
        assert result.copied[0] > 0 and result.memory.stored_bytes < c.expected.memory.stored_bytes


# -- a few of each, always ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [HOST, DISK, RECOMPUTE])
@pytest.mark.parametrize(("name", "mesh"), [("gpt2-tiny", (2,)), ("resnet-tiny", (1,)), ("mixtral-tiny", (2, 2))])
def test_one_place_for_all_results(name, mesh, place):
    assert_forced(case(name, mesh), place)


@pytest.mark.parametrize("place", STATE_PLACES[1:], ids=lambda place: place.text)
def test_one_place_for_all_state(place):
    assert_state(case("gpt2-tiny", (2,)), place)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", ["mlp-tiny", "convnet-tiny", "gnn-tiny"])
def test_random_places(name, clip):
    for mesh in MESHES:
        c = case(name, mesh, clip)
        for seed in range(2):
            assert_same(c, mixed(c, seed))


def test_clipping_changes_the_step_that_is_compared():
    """Else the cases with clipping would show nothing."""
    plain, clipped = case("mlp-tiny", (1,)).expected, case("mlp-tiny", (1,), 0.1).expected
    assert any(not torch.equal(plain.values[key], clipped.values[key]) for key in plain.values)


@pytest.mark.parametrize("mesh", MESHES)
def test_dropout_is_the_same_when_made_again(mesh):
    """What is made again drops the same elements, and dropout does drop."""
    c = case("dropped", mesh)
    assert_forced(c, RECOMPUTE)
    for seed in range(3):
        assert_same(c, mixed(c, seed))
    plain = c.model.eval()
    try:
        still = capture(plain, c.batch, optimizer=c.optimizer)
    finally:
        c.model.train()
    assert len(still.ops) < len(c.analysis.step.ops), "the compared model has no dropout"


def test_momentum():
    c = case("mlp-tiny", (2,), None, "sgd")
    assert any(slot == "momentum_buffer" for _, _, slot in c.expected.values)
    assert_state(c, StatePlace(DISK, DISK, "device"))
    for seed in range(4):
        assert_same(c, mixed(c, seed))


# -- parameters fetched in the type they are read in ------------------------------------------------------------------------


NARROW = StatePlace(HOST, HOST, HOST, cast=True)
DEFERRED = replace(NARROW, deferred=True)
FETCHED_WHOLE = replace(NARROW, update="device")


def of_all(c: Case, place: StatePlace) -> Assignment:
    """One place for all parameters, or the next to it that they can have."""
    out = c.assignment()
    out.state = {param: possible(out, c.uses, param, place) for param, _ in c.uses.parameters()}
    return out


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_narrow_parameters_move_half_the_bytes(optimizer):
    """The wide ones are what is read in float32 too (embeddings, norms): the same on both sides."""
    c = case("opt-tiny", (1,), None, optimizer, torch.bfloat16)
    wide = assert_same(c, of_all(c, StatePlace(HOST, HOST, HOST)))
    narrow = assert_same(c, of_all(c, NARROW))
    num_bytes = STEPS * sum(param.meta["val"].numel() * 4 for param in c.uses.casts)
    assert wide.copied[0] - narrow.copied[0] == num_bytes / 2, "gradients go as the backward pass makes them"
    assert wide.copied[1] - narrow.copied[1] == num_bytes / 2, "kept from the forward to the backward pass: one fetch"


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_narrow_parameters_that_the_device_updates(optimizer, clip):
    """Half the bytes for the forward pass, all of them for the update, and both forms back."""
    c = case("opt-tiny", (1,), clip, optimizer, torch.bfloat16)
    num_bytes = STEPS * sum(param.meta["val"].numel() * 4 for param in c.uses.casts)
    read_again = STEPS * sum(param.meta["val"].numel() * 4 for param, cast in c.uses.casts.items() if c.uses.later[cast])
    for early, residency in itertools.product((False, True), ({}, dict.fromkeys(c.uses.casts.values(), RECOMPUTE))):
        wide, narrow = (of_all(c, place) for place in (replace(FETCHED_WHOLE, cast=False), FETCHED_WHOLE))
        wide.early_updates = narrow.early_updates = early
        wide.residency = narrow.residency = residency
        a, b = assert_same(c, wide), assert_same(c, narrow)
        # Where the backward pass fetches it again, whole for an update that follows at once.
        again = read_again if residency and (clip or not early) else 0
        assert a.copied[1] - b.copied[1] == (num_bytes + again) / 2
        assert b.copied[0] - a.copied[0] == num_bytes / 2
        assert sum(node.target is tiers.write_back_cast for node in b.program.graph.nodes) == len(c.uses.casts)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("mesh", [(1,), (2,)])
def test_updates_beside_the_next_step(mesh, clip):
    """Deferred where the gradient is sent as it is; clipped or summed ones are not that."""
    c = case("opt-tiny", mesh, clip, "adamw", torch.bfloat16)
    for early in (False, True):
        out = of_all(c, DEFERRED)
        out.early_updates = early
        result = assert_same(c, out)
        if mesh == (1,):
            started = [node for node in result.program.graph.nodes if node.target is tiers.start_deferred]
            assert len(started) == (0 if clip else len(c.uses.casts))


def test_random_places_of_narrow_parameters():
    c = case("opt-tiny", (1,), None, "adamw", torch.bfloat16)
    for seed in range(3):
        out = mixed(c, seed)
        rng = random.Random(seed)
        for param in c.uses.casts:
            out.state[param] = possible(out, c.uses, param, rng.choice([NARROW, DEFERRED, FETCHED_WHOLE, *STATE_PLACES]))
        assert_same(c, out)


# -- all of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *DROPOUT])
def test_every_place_alone(name):
    """On two ranks; the mixes below have all meshes."""
    c = case(name, (2,))
    for place in (HOST, DISK, RECOMPUTE):
        assert_forced(c, place)
    for place in STATE_PLACES[1:]:
        assert_state(c, place)
    for seed in range(3):
        assert_same(c, mixed(c, seed))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "clip"), [((1,), None), ((1,), 0.1), ((2, 2), 0.1)], ids=["1", "1 clipped", "2x2 clipped"])
@pytest.mark.parametrize("name", [*FAMILIES, *DROPOUT])
def test_random_places_of_every_family(name, mesh, clip):
    c = case(name, mesh, clip)
    for seed in range(3):
        assert_same(c, mixed(c, seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-tiny", "t5-tiny", "resnet-tiny", "mixtral-tiny"])
def test_momentum_of_more_families(name):
    c = case(name, (2,), None, "sgd")
    for place in STATE_PLACES[1:]:
        assert_state(c, place)
    for seed in range(3):
        assert_same(c, mixed(c, seed))
