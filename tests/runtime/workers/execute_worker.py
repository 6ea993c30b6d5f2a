"""One rank of test_execute: runs the small programs, or one of the ways in which a job goes wrong."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from opweave.runtime.collectives import CommunicationError
from opweave.runtime.execute import Executor
from opweave.runtime.groups import AgreementError, AxisGroups, GroupError
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.program import shard_inputs
from opweave.runtime.sharding import unravel
from opweave.runtime.state import ProgramState

sys.path.insert(0, str(Path(__file__).parents[1]))
from programs import Linear, batches, linear_program, optimizer_of
from tier_programs import Chain, chain_program


def train() -> None:
    groups = AxisGroups((2,))
    groups.check_agreement({"plan": "the same", "model": "the same"})
    for zero, zero_dim in ((0, 0), (2, 0), (2, 1), (3, 0)):
        program = linear_program(zero=zero, zero_dim=zero_dim)
        model = Linear()
        optimizer = optimizer_of("AdamW", model.parameters())
        executor = Executor(program, groups, optimizer=optimizer, state=ProgramState.from_model(program, model, groups.coords))
        memory = executor.state.tensors["param", "w", ""].data_ptr()
        states = [ProgramState.from_model(program, model, unravel(rank, (2,))) for rank in range(2)]
        lockstep = LockstepExecutor(program, optimizer, states=states)
        for x in batches():
            (loss,) = executor.run(shard_inputs(program, {"x": x}, groups.coords))
            (expected,) = lockstep.run({"x": x})
            assert torch.equal(loss, expected), f"{loss} {expected}"
            for key, value in executor.state.tensors.items():
                assert torch.equal(value, states[groups.rank].tensors[key]), f"{key} differs"
        assert memory == executor.state.tensors["param", "w", ""].data_ptr(), "the new weight is in new memory"
    train_in_tiers(groups)
    dist.barrier()
    print("execute ok", flush=True)


def train_in_tiers(groups: AxisGroups) -> None:
    """Activations and state in other tiers, each rank with a store of its own; copies by threads beside the collectives."""
    for tier, state_tier, update_on in (("disk", "disk", "device"), ("disk", "host", "host")):
        program = chain_program(tier, mesh=(2,), state_tier=state_tier, update_on=update_on)
        model = Chain()
        optimizer = optimizer_of("AdamW", model.parameters())
        executor = Executor(program, groups, optimizer=optimizer)
        executor.state = ProgramState.from_model(program, model, groups.coords, store=executor.store)
        lockstep = LockstepExecutor(program, optimizer)
        lockstep.states = [ProgramState.from_model(program, model, (rank,), store=store) for rank, store in enumerate(lockstep.stores)]
        for x in batches(width=16):
            (loss,) = executor.run(shard_inputs(program, {"x": x}, groups.coords))
            (expected,) = lockstep.run({"x": x})
            assert torch.equal(loss, expected), f"{loss} {expected}"
            for key in executor.state.tensors:
                assert torch.equal(executor.state.value(key), lockstep.states[groups.rank].value(key)), f"{key} differs"
        assert executor.traffic.offloaded_bytes > 0 and executor.traffic.fetched_bytes > 0
        executor.close()


def disagree() -> None:
    groups = AxisGroups((2,))
    try:
        groups.check_agreement({"plan": "the same", "model": f"model {groups.rank}"})
    except AgreementError as error:
        print(f"rank refused: {error}", flush=True)


def world() -> None:
    for mesh in ((4,), (1,)):
        try:
            AxisGroups(mesh)
        except GroupError as error:
            print(error, flush=True)


def stop() -> None:
    groups = AxisGroups((2,))
    program = linear_program()
    model = Linear()
    state = ProgramState.from_model(program, model, groups.coords)
    executor = Executor(program, groups, optimizer=optimizer_of("AdamW", model.parameters()), state=state)
    dist.barrier()
    if groups.rank == 1:
        sys.stdout.flush()
        os._exit(0)
    for work in (lambda: executor.run({"x": torch.ones(4, 4)}), lambda: groups.check_agreement({"model": "mine"})):
        try:
            work()
        except CommunicationError as error:
            print(f"rank 0 refused: {error}", flush=True)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    for work in (stop,) if sys.argv[1:] == ["stop"] else (disagree, world, train):
        work()
    dist.destroy_process_group()


main()
