"""Values and state in other tiers of memory: the same numbers, less memory, every copy counted, every failure told."""

import pytest
import torch
from opweave.runtime.dry_run import dry_run
from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.state import ProgramState
from opweave.runtime.tiers import TierStore

from .programs import batches, optimizer_of
from .tier_programs import Chain, chain_program

WIDTH = 16


def executor_of(program, store=None, **options) -> Executor:
    model, store = Chain(WIDTH), store or TierStore()
    optimizer = optimizer_of(program.optimizer, model.parameters())
    state = ProgramState.from_model(program, model, (0,), store=store)
    return Executor(program, AxisGroups((1,)), optimizer=optimizer, state=state, tiers=store, **options)


def losses_and_weight(executor, num=3):
    losses = [executor.run({"x": x})[0] for x in batches(num, width=WIDTH)]
    return torch.stack(losses), executor.state.value(("param", "w", ""))


CHOICES = [(tier, state_tier, "device") for tier in ("host", "disk") for state_tier in ("device", "host", "disk")]
CHOICES += [("device", "disk", "device"), ("device", "host", "host"), ("disk", "host", "host")]


@pytest.mark.parametrize(("tier", "state_tier", "update_on"), CHOICES)
def test_the_same_numbers_as_on_the_device(tier, state_tier, update_on):
    expected = losses_and_weight(executor_of(chain_program("device")))
    executor = executor_of(chain_program(tier, state_tier=state_tier, update_on=update_on))
    found = losses_and_weight(executor)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    executor.close()


@pytest.mark.parametrize(("tier", "state_tier", "update_on"), CHOICES)
def test_peaks_per_pool_are_those_of_the_dry_run(tier, state_tier, update_on):
    program = chain_program(tier, state_tier=state_tier, update_on=update_on)
    executor = executor_of(program)
    losses_and_weight(executor, 1)
    predicted = dry_run(program)
    assert predicted.pools == executor.memory.pools
    assert predicted.pool_owners == executor.memory.pool_owners


@pytest.mark.parametrize(("tier", "state_tier", "update_on"), CHOICES)
def test_ranks_in_lockstep_have_tiers_of_their_own(tier, state_tier, update_on):
    expected = losses_and_weight(executor_of(chain_program("device")))
    program = chain_program(tier, mesh=(2,), state_tier=state_tier, update_on=update_on)
    model = Chain(WIDTH)
    lockstep = LockstepExecutor(program, optimizer_of(program.optimizer, model.parameters()), account=True)
    lockstep.states = [ProgramState.from_model(program, model, (rank,), store=store) for rank, store in enumerate(lockstep.stores)]
    losses = torch.stack([lockstep.run({"x": x})[0] for x in batches(width=WIDTH)])
    assert torch.allclose(losses, expected[0], rtol=1e-6)
    for state in lockstep.states:
        assert torch.allclose(state.value(("param", "w", "")), expected[1], rtol=1e-5, atol=1e-6)
