"""The lockstep executor: all ranks in one process, with the results of one device."""

import operator

import pytest
import torch
from torch import fx

from opweave.runtime import collectives as co
from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import ShardSpec, replicated, unravel
from opweave.runtime.state import ProgramState

from .programs import Linear, aten, batches, linear_program, optimizer_of


def lockstep_of(program, kind="AdamW", dtype=torch.float64, **options) -> LockstepExecutor:
    model = Linear(dtype=dtype)
    size = program.mesh[0]
    states = [ProgramState.from_model(program, model, unravel(rank, program.mesh)) for rank in range(size)]
    return LockstepExecutor(program, optimizer_of(kind, model.parameters()), states=states, **options)


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_training_equals_eager(size, kind, zero):
    program = linear_program(mesh=(size,), kind=kind, dtype=torch.float64, zero=zero)
    executor = lockstep_of(program, kind)
    reference = Linear(dtype=torch.float64)
    optimizer = optimizer_of(kind, reference.parameters())
    for x in batches(dtype=torch.float64):
        (loss,) = executor.run({"x": x})
        expected = reference(x)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert torch.allclose(loss, expected, rtol=1e-13)
    spec = program.stored["param", "w", ""].spec
    whole = spec.unshard([state.tensors["param", "w", ""] for state in executor.states])
    assert torch.allclose(whole, reference.w, rtol=1e-11)


def test_one_rank_equals_the_executor_bit_for_bit():
    program = linear_program(mesh=(1,))
    lockstep = lockstep_of(program, dtype=torch.float32)
    model = Linear()
    optimizer = optimizer_of("AdamW", model.parameters())
    executor = Executor(program, AxisGroups((1,)), optimizer=optimizer, state=ProgramState.from_model(program, model, (0,)))
    for x in batches():
        assert torch.equal(lockstep.run({"x": x})[0], executor.run({"x": x})[0])
    for key, value in executor.state.tensors.items():
        assert torch.equal(lockstep.states[0].tensors[key], value)


def test_collectives_are_counted_with_their_bytes():
    executor = lockstep_of(linear_program(mesh=(2,), dtype=torch.float64, zero=3))
    executor.run({"x": batches(dtype=torch.float64)[0]})
    assert executor.collectives.num == {"all_gather": 1, "all_reduce": 1, "reduce_scatter": 1}
    assert executor.collectives.num_bytes == {"all_gather": 64, "all_reduce": 8, "reduce_scatter": 128}
    single = lockstep_of(linear_program(mesh=(1,), dtype=torch.float64, zero=3))
    single.run({"x": batches(dtype=torch.float64)[0]})
    assert single.collectives.num == {}


def test_memory_of_rank_zero():
    executor = lockstep_of(linear_program(mesh=(2,), dtype=torch.float64), account=True)
    executor.run({"x": batches(dtype=torch.float64)[0]})
    assert executor.memory.stored_bytes == 3 * 128  # the weight and its two moments
    assert executor.memory.peak_bytes > executor.memory.stored_bytes


def reshard_program(mesh, source, target, emit) -> LocalProgram:
    graph = fx.Graph()
    coords, x = graph.placeholder("coords"), graph.placeholder("x")
    graph.output((emit(graph, coords, x),))
    return LocalProgram(
        mesh=mesh, graph=graph, inputs=(Port(name="x", kind="batch", fqn="x", spec=source),),
        outputs=(Port(name="o", kind="extra", fqn="", spec=target),),
    )  # fmt: skip


def spec_of(axes, mesh):
    return ShardSpec(shape=(4, 8), factors=((4,), (2, 4)), axes=axes, mesh=mesh)


def wait(graph, *call):
    return graph.call_function(co.wait, (graph.call_function(*call),))


CHANGES = {
    "all_gather": (((1, 1), None), (None, None), lambda g, c, x: wait(g, co.all_gather, (x, (0,), 1, 2))),
    "all_to_all": ((None, (0, 0)), (None, (1, 1)), lambda g, c, x: wait(g, co.all_to_all, (x, (1,), 1, 2, 0, 1))),
    "slice": ((None, None), ((0, 0), (1, 1)), lambda g, c, x: g.call_function(
        co.take_shard, (g.call_function(co.take_shard, (x, c, (0,), (2,), 0, 1)), c, (1,), (2,), 1, 2))),
    "zero": ((None, (0, 0)), ("sum", (0, 0)), lambda g, c, x: g.call_function(co.zero_unless_first, (x, c, (0,)))),
    "zero, scatter": ((None, None), ((0, 0), None), lambda g, c, x: wait(
        g, co.reduce_scatter, (g.call_function(co.zero_unless_first, (x, c, (0,))), (0,), 0, 1), {"op": "sum"})),
    "kwargs": ((None, (0, 0)), (None, None), lambda g, c, x: wait(g, co.all_gather, (x,), {"axes": (1,), "dim": 0, "outer": 1})),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_layout_changes_keep_the_tensor(change):
    mesh = (2, 2)
    before, after, emit = CHANGES[change]
    executor = LockstepExecutor(reshard_program(mesh, spec_of(before, mesh), spec_of(after, mesh), emit))
    executor.states = [ProgramState(executor.program, coords) for coords in executor.coords]
    x = torch.randn(4, 8)
    assert torch.equal(executor.run({"x": x})[0], x)


def test_results_are_each_ranks_own():
    """In real life a rank may write into what a collective gave it."""
    for results in (
        co_results for co_results in (
            _run(co.all_reduce, op="sum"), _run(co.all_gather, dim=0, outer=1), _run(co.reduce_scatter, dim=0, outer=1, op="sum"),
            _run(co.all_to_all, split_dim=0, split_outer=1, gather_dim=0, gather_outer=1),
        )
    ):  # fmt: skip
        assert len({result.untyped_storage().data_ptr() for result in results}) == 2


def _run(function, **options):
    from opweave.runtime.lockstep import DEFINITIONS

    return DEFINITIONS[function]([torch.ones(4), torch.ones(4)], **options)


def test_an_error_names_rank_and_instruction():
    mesh = (2,)
    spec = replicated((4,), mesh)

    def only_on_rank_one(x, coords):
        if coords[0] == 1:
            raise RuntimeError("no")
        return x

    program = reshard_program(mesh, spec, spec, lambda g, c, x: g.call_function(only_on_rank_one, (x, c)))
    executor = LockstepExecutor(program)
    executor.states = [ProgramState(program, coords) for coords in executor.coords]
    with pytest.raises(RuntimeError) as caught:
        executor.run({"x": torch.ones(4)})
    assert "on rank 1 of the mesh (2,) in lockstep" in caught.value.__notes__[-1]
    assert "instruction only_on_rank_one" in caught.value.__notes__[0]


def test_states_must_be_one_per_rank():
    program = linear_program(mesh=(2,))
    executor = LockstepExecutor(program, optimizer_of("AdamW", Linear().parameters()))
    with pytest.raises(RuntimeError, match="has no states yet"):
        executor.run({"x": batches()[0]})
    with pytest.raises(ValueError, match="1 states were given for the 2 ranks"):
        executor.states = [ProgramState.from_model(program, Linear(), (0,))]
    executor.states = [ProgramState.from_model(program, Linear(), (rank,)) for rank in range(2)]
    with pytest.raises(ValueError, match="input 'x': a tensor of shape"):
        executor.run({"x": torch.ones(3, 4)})


def test_bucket_results_are_taken_apart():
    mesh = (2,)
    spec = replicated((4,), mesh)

    def emit(graph, coords, x):
        y = graph.call_function(aten.mul.Tensor, (x, 0.5))
        both = wait(graph, co.all_reduce_bucket, ([x, y], (0,), "sum"))
        return graph.call_function(operator.getitem, (both, 1))

    executor = LockstepExecutor(reshard_program(mesh, spec, spec, emit))
    executor.states = [ProgramState(executor.program, coords) for coords in executor.coords]
    assert executor.run({"x": torch.ones(4)})[0].tolist() == [1.0] * 4
    assert executor.collectives.num == {"all_reduce_bucket": 1}
