"""The dry run predicts what the executor then measures."""

import operator
from dataclasses import replace

import pytest
import torch
from torch import fx

from opweave.runtime import collectives as co
from opweave.runtime.dry_run import dry_run
from opweave.runtime.execute import Executor
from opweave.runtime.groups import PaperGroups
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import replicated
from opweave.runtime.state import ProgramState

from .programs import Linear, batches, linear_program, optimizer_of, trained


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_one_device_as_the_executor_measures_it(kind):
    executor = trained(1, kind)
    predicted = dry_run(executor.program)
    assert (predicted.peak_bytes, predicted.stored_bytes) == (executor.memory.peak_bytes, executor.memory.stored_bytes)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_devices_as_the_executor_measures_the_last(zero, backend):
    program, model = linear_program(zero=zero), Linear()
    groups = PaperGroups((2,), backend=backend)
    state = ProgramState.from_model(program, model, groups.coords)
    executor = Executor(program, groups, optimizer=optimizer_of("AdamW", model.parameters()), state=state)
    executor.run({"x": batches()[0].chunk(2)[1].clone()})  # own memory: no view of the global batch
    predicted = dry_run(program, backend=backend)
    assert predicted.pools == executor.memory.pools and predicted.owners == executor.memory.owners


NUM, SIDE = 3, 16
BYTES = SIDE * SIDE * 4


def bucket_program(target, *args) -> LocalProgram:
    """Inputs, one collective of all of them over 2 devices, and the parts of what it gives."""
    graph = fx.Graph()
    graph.placeholder("coords")
    inputs = [graph.placeholder(f"x{i}") for i in range(NUM)]
    whole = graph.call_function(co.wait, (graph.call_function(target, (inputs, (0,), *args)),))
    graph.output(tuple(graph.call_function(operator.getitem, (whole, i)) for i in range(NUM)))
    ports = tuple(Port(name=f"x{i}", kind="batch", fqn="", spec=replicated((SIDE, SIDE), (2,))) for i in range(NUM))
    return LocalProgram(mesh=(2,), graph=graph, inputs=ports, outputs=tuple(replace(port, kind="extra") for port in ports))


@pytest.mark.parametrize(
    ("target", "args", "times"),
    [
        # The inputs, the same packed, and what arrives of the neighbour; the results are parts of that.
        (co.all_reduce_bucket, (), 3),
        # The inputs, the same packed, and the neighbour's half of this device's result.
        (co.reduce_scatter_bucket, ([0] * NUM, [1] * NUM), 2.5),
        # The inputs are gone: the same packed, twice as much that is gathered, and the results, put together of it.
        (co.all_gather_bucket, ([0] * NUM, [1] * NUM), 5),
    ],
)
def test_buckets_hold_what_they_pack(target, args, times):
    program = bucket_program(target, *args)
    assert dry_run(program).peak_bytes == times * NUM * BYTES
    groups = PaperGroups((2,))
    executor = Executor(program, groups, state=ProgramState.from_model(program, torch.nn.Module(), groups.coords))
    executor.run({f"x{i}": torch.ones(SIDE, SIDE) for i in range(NUM)})
    assert executor.memory.peak_bytes == dry_run(program).peak_bytes


def test_a_gathered_update_takes_no_second_copy():
    """Wide weight, small batch: the peak is where the new weight arrives."""
    width = 32
    weight, piece = width * width * 4, width * width * 2
    report = dry_run(linear_program(zero=2, batch=2, width=width))
    assert report.stored_bytes == weight + 2 * piece
    losses = 2 * 4
    assert report.peak_bytes == report.stored_bytes + weight + piece + losses, "gradient and what arrives; no new weight beside the old"
