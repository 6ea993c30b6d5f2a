"""Parameters that the device reads in a narrower type, and updates that the CPU does beside the next step."""

import operator

import pytest
import torch
from torch import fx

from opweave.runtime import tiers, update
from opweave.runtime.execute import Executor, check_updates_last
from opweave.runtime.groups import AxisGroups
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import replicated
from opweave.runtime.state import ProgramState
from opweave.runtime.tiers import TierStore

from .programs import optimizer_of
from .test_state import alone

aten = torch.ops.aten
WIDTH = 64
SLOTS = update.STATE_SLOTS["AdamW"][:2]


class Scaled(torch.nn.Module):
    """loss = mean(x w in bfloat16)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))


def program(*, is_deferred: bool) -> LocalProgram:
    """Trains `Scaled`: w is stored in float32 and bfloat16, its gradient is sent in bfloat16."""
    graph = fx.Graph()
    call = graph.call_function
    graph.placeholder("coords")
    x, w, *states = (graph.placeholder(name) for name in ("x", "w", *SLOTS))
    if is_deferred:
        started = call(tiers.start_deferred, ([w], [states], ["w"]))
        w, *states = (call(operator.getitem, (started, i)) for i in range(3))
    narrow = call(tiers.arrive, (call(tiers.fetch_cast, (w,)),))
    loss = call(aten.mean.default, (call(aten.mm.default, (x, narrow)),))
    grad = call(aten.mm.default, (call(aten.t.default, (x,)), call(aten.div.Scalar, (call(aten.ones_like.default, (x,)), WIDTH * WIDTH))))
    sent = call(tiers.send_gradient, (w, grad))
    if is_deferred:
        new = call(tiers.defer_update, ([w], [call(tiers.settle, (sent,))], [states], "AdamW", 0, ["w"], loss))
    else:
        updating = call(tiers.host_update, ([w], [sent], [states], "AdamW", 0, ["w"], loss))
        new = call(tiers.updated, (updating, [call(tiers.settle, (sent,))]))
    graph.output((loss, *(call(operator.getitem, (new, i)) for i in range(3))))
    spec = replicated((WIDTH, WIDTH), (1,))
    common = {"fqn": "w", "group": 0, "spec": spec, "tier": "host"}
    ports = [Port(name="w", kind="param", cast=torch.bfloat16, **common), *(Port(name=s, kind="state", slot=s, **common) for s in SLOTS)]
    data = Port(name="x", kind="batch", fqn="x", dtype=torch.bfloat16, spec=spec)
    loss_port = Port(name="loss", kind="loss", fqn="", dtype=torch.bfloat16, spec=replicated((), (1,)))
    return LocalProgram(mesh=(1,), graph=graph, inputs=(data, *ports), outputs=(loss_port, *ports), optimizer="AdamW")


def executor_of(*, is_deferred: bool) -> Executor:
    model, made, store = Scaled(), program(is_deferred=is_deferred), TierStore()
    optimizer = optimizer_of("AdamW", model.parameters())
    state = ProgramState.from_model(made, model, (0,), store=store)
    return Executor(made, AxisGroups((1,)), optimizer=optimizer, state=state, tiers=store)


def batch(i: int) -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(i)).bfloat16()


def trained(executor: Executor, num: int, *, rate: float = 1.0) -> list[torch.Tensor]:
    """Losses of some steps; the learning rate is multiplied behind each, as a scheduler does."""
    losses = []
    for i in range(num):
        losses.append(executor.run({"x": batch(i)})[0].clone())
        executor.optimizer.param_groups[0]["lr"] *= rate
    return losses


def stored(executor: Executor) -> list[torch.Tensor]:
    return [executor.state.value(key) for key in executor.program.stored]


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_deferred_updates_yield_the_same_bits(rate):
    """Also where the learning rate changes between a step and its update."""
    plain, deferred = executor_of(is_deferred=False), executor_of(is_deferred=True)
    assert all(torch.equal(a, b) for a, b in zip(trained(plain, 4, rate=rate), trained(deferred, 4, rate=rate), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stored(plain), stored(deferred), strict=True))
    assert float(plain.state.steps["w"]) == float(deferred.state.steps["w"]) == 4
    for executor in (plain, deferred):
        executor.close()


def test_the_narrow_form_is_that_of_the_parameter_behind_an_update():
    executor = executor_of(is_deferred=True)
    trained(executor, 2)
    parked = executor.state.tensors["param", "w", ""]
    executor.store.finish_updates()
    assert torch.equal(executor.store.load(parked.cast), executor.store.load(parked).bfloat16())
    executor.close()


def test_nothing_is_learned_from_a_loss_that_is_not_finite():
    executor = executor_of(is_deferred=True)
    trained(executor, 2)
    before = [tensor.clone() for tensor in stored(executor)]
    executor.run({"x": torch.full((WIDTH, WIDTH), float("nan"), dtype=torch.bfloat16)})
    assert all(torch.equal(a, b) for a, b in zip(before, stored(executor), strict=True))
    executor.close()


def test_a_checkpoint_has_what_was_deferred(tmp_path):
    executor, other = executor_of(is_deferred=True), executor_of(is_deferred=False)
    trained(executor, 3)
    executor.state.save(tmp_path / "checkpoint", alone())
    other.state.load(tmp_path / "checkpoint", alone())
    assert all(torch.equal(a, b) for a, b in zip(stored(executor), stored(other), strict=True))
    assert float(other.state.steps["w"]) == 3
    assert torch.equal(executor.run({"x": batch(7)})[0], other.run({"x": batch(7)})[0]), "the narrow form is loaded, too"
    for each in (executor, other):
        each.close()


def test_a_step_that_failed_leaves_no_gradient_for_a_parameter():
    executor, other = executor_of(is_deferred=True), executor_of(is_deferred=False)
    groups = executor.optimizer.param_groups
    kept = groups[:]
    groups.clear()
    with pytest.raises(ValueError, match="the optimizer has 0"):
        executor.run({"x": batch(0)})
    groups += kept
    assert torch.equal(executor.run({"x": batch(0)})[0], other.run({"x": batch(0)})[0])
    for each in (executor, other):
        each.close()


def test_the_old_parameter_is_not_read_behind_the_start_of_its_update():
    made = program(is_deferred=True)
    placeholder = next(node for node in made.graph.nodes if node.name == "w")
    fetch = next(node for node in made.graph.nodes if node.target is tiers.fetch_cast)
    fetch.args = (placeholder,)
    with pytest.raises(AssertionError, match="reads w after start_deferred has updated it"):
        check_updates_last(made.graph)
