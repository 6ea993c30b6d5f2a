"""The dry run predicts what the executor then measures."""

import pytest
from opweave.runtime.dry_run import dry_run
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.sharding import unravel
from opweave.runtime.state import ProgramState

from .programs import Linear, batches, linear_program, optimizer_of, trained


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_one_device_as_the_executor_measures_it(kind):
    executor = trained(1, kind)
    predicted = dry_run(executor.program)
    assert (predicted.peak_bytes, predicted.stored_bytes) == (executor.memory.peak_bytes, executor.memory.stored_bytes)


@pytest.mark.parametrize("zero", [0, 3])
def test_two_devices_as_lockstep_measures_rank_zero(zero):
    program, model = linear_program(zero=zero), Linear()
    states = [ProgramState.from_model(program, model, unravel(rank, (2,))) for rank in range(2)]
    executor = LockstepExecutor(program, optimizer_of("AdamW", model.parameters()), states=states, account=True)
    executor.run_local([{"x": part.clone()} for part in batches()[0].chunk(2)])  # own memory: not views of the global batch
    assert dry_run(program).peak_bytes == executor.memory.peak_bytes


def test_a_gathered_update_takes_no_second_copy():
    """Wide weight, small batch: the peak is where the new weight arrives."""
    width = 32
    weight, piece = width * width * 4, width * width * 2
    report = dry_run(linear_program(zero=2, batch=2, width=width))
    assert report.stored_bytes == weight + 2 * piece
    loss = 4
    assert report.peak_bytes == report.stored_bytes + weight + piece + loss, "gradient and its piece; no new weight beside the old"
