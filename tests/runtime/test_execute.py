"""The executor: same numbers as eager PyTorch, values freed at their last use, errors that say where."""

import operator
import weakref

import pytest
import torch
from torch import fx

from opweave.runtime import collectives as co
from opweave.runtime import update
from opweave.runtime.execute import Executor, check_updates_last, program_axes, write
from opweave.runtime.groups import AxisGroups, GroupError
from opweave.runtime.memory import MemoryLimitError
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import replicated
from opweave.runtime.state import ProgramState

from .launch import launch
from .programs import Linear, aten, batches, linear_program, optimizer_of


def executor_of(kind="AdamW", **options) -> tuple[Executor, Linear]:
    program = linear_program(mesh=(1,), kind=kind)
    model = Linear()
    state = ProgramState.from_model(program, model, (0,))
    return Executor(program, AxisGroups((1,)), optimizer=optimizer_of(kind, model.parameters()), state=state, **options), model


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_one_rank_equals_eager(kind):
    executor, _ = executor_of(kind)
    reference = Linear()
    optimizer = optimizer_of(kind, reference.parameters())
    for x in batches():
        (loss,) = executor.run({"x": x})
        expected = reference(x)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert torch.allclose(loss, expected, rtol=1e-6)  # the hand-written loss divides after the sum
        assert torch.allclose(executor.state.tensors["param", "w", ""], reference.w, rtol=1e-6, atol=1e-7)


def test_two_ranks_equal_lockstep_and_jobs_that_do_not_fit_are_refused():
    """One job for all of it: a rank that refuses goes on."""
    output = launch("execute_worker.py", num_ranks=2, torchrun=True)
    assert output.count("execute ok") == 2
    assert output.count("rank refused: the ranks of this job do not run the same program: model differs (rank 0:") == 2
    assert output.count("the mesh 4 needs 4 ranks, but this job has 2") == 2
    assert output.count("the mesh 1 needs 1 rank, but this job has 2") == 2


def one_op_program(build, num_inputs=1, shape=(4,)) -> LocalProgram:
    graph = fx.Graph()
    graph.placeholder("coords")
    inputs = [graph.placeholder(f"x{i}") for i in range(num_inputs)]
    graph.output(tuple(build(graph, *inputs)))
    ports = tuple(Port(name=f"x{i}", kind="batch", fqn=f"x{i}", spec=replicated(shape, (1,))) for i in range(num_inputs))
    num_outputs = len(next(n for n in graph.nodes if n.op == "output").args[0])
    outputs = tuple(Port(name=f"o{i}", kind="extra", fqn="") for i in range(num_outputs))
    return LocalProgram(mesh=(1,), graph=graph, inputs=ports, outputs=outputs)


def run(program, *values, **options):
    executor = Executor(program, AxisGroups((1,)), state=ProgramState(program, (0,)), **options)
    result = executor.run({f"x{i}": value for i, value in enumerate(values)})
    again = executor.run({f"x{i}": value for i, value in enumerate(values)})
    for one, other in zip(result, again, strict=True):
        assert torch.equal(one, other), "the accounted first run and the later ones differ"
    return result, executor


def test_arguments_of_every_kind():
    def build(graph, x):
        call = graph.call_function
        stacked = call(aten.stack.default, ([x, x],), {"dim": 1})
        filled = call(aten.full.default, ([2, 2], float("inf")), {"dtype": torch.float64, "device": torch.device("cpu")})
        indexed = call(aten.index.Tensor, (stacked, [None, call(aten.arange.default, (1,))]))
        return stacked, filled, indexed, 3, None

    program = one_op_program(build)
    executor = Executor(program, AxisGroups((1,)), state=ProgramState(program, (0,)))
    stacked, filled, indexed, number, nothing = executor.run({"x0": torch.arange(4.0)})
    assert stacked.shape == (4, 2) and filled.dtype == torch.float64 and indexed.shape == (4, 1)
    assert torch.isinf(filled).all() and number == 3 and nothing is None


def test_values_die_at_their_last_use():
    alive: list[int] = []
    made: list[weakref.ref] = []

    def note(x):
        out = x + 1
        made.append(weakref.ref(out.untyped_storage()))
        alive.append(sum(ref() is not None for ref in made))
        return out

    def build(graph, x):
        for _ in range(5):
            x = graph.call_function(note, (x,))
        return (x,)

    program = one_op_program(build)
    executor = Executor(program, AxisGroups((1,)), state=ProgramState(program, (0,)))
    for _ in range(2):
        executor.run({"x0": torch.ones(4)})
        made.clear()
    assert max(alive) <= 2, f"alive values per instruction: {alive}"


def test_parts_of_a_tuple_nobody_uses_do_not_stay():
    def build(graph, x):
        parts = graph.call_function(torch.Tensor.split, (x, 1024))
        parts = graph.call_function(lambda p: tuple(v.clone() for v in p), (parts,))
        y = graph.call_function(aten.mul.Tensor, (x, 2))
        y = graph.call_function(aten.mul.Tensor, (y, 2))
        first = graph.call_function(operator.getitem, (parts, 0))
        return (graph.call_function(aten.sum.default, (first,)), graph.call_function(aten.sum.default, (y,)))

    _, executor = run(one_op_program(build, shape=(4096,)), torch.ones(4096))
    # x, the part that is used, and the first generation of y.
    assert executor.memory.peak_bytes == 4 * (4096 + 1024 + 4096)


def test_peak_memory_and_owners():
    def build(graph, x):
        a = graph.call_function(aten.mul.Tensor, (x, 2))
        view = graph.call_function(aten.view.default, (a, [2, 8]))
        b = graph.call_function(aten.add.Tensor, (view, view))
        return (graph.call_function(aten.sum.default, (b,)),)

    _, executor = run(one_op_program(build, shape=(16,)), torch.ones(16))
    report = executor.memory
    assert report.peak_bytes == 2 * 64 and report.at == "mul_tensor"
    assert report.owners == (("mul_tensor", 64), ("x0", 64))


def test_memory_limit_names_what_is_alive():
    program = one_op_program(lambda g, x: (g.call_function(aten.mul.Tensor, (x, 2)),), shape=(16,))
    text = r"needs at least 128 bytes on the device at mul_tensor, 100 are allowed.*Largest: mul_tensor 64, x0 64"
    with pytest.raises(MemoryLimitError, match=text):
        run(program, torch.ones(16), limit_bytes=100)


def test_an_error_names_its_instruction():
    def build(graph, x):
        y = graph.call_function(aten.mul.Tensor, (x, 2))
        return (graph.call_function(aten.view.default, (y, [3])),)

    with pytest.raises(RuntimeError) as caught:
        run(one_op_program(build), torch.ones(4))
    assert any("instruction view_default = aten.view.default" in note for note in caught.value.__notes__)


def test_inputs_that_do_not_fit():
    program = one_op_program(lambda g, x: (g.call_function(aten.mul.Tensor, (x, 2)),))
    executor = Executor(program, AxisGroups((1,)), state=ProgramState(program, (0,)))
    with pytest.raises(ValueError, match=r"needs the input 'x0'.*given were \[\]"):
        executor.run({})
    with pytest.raises(ValueError, match=r"no inputs \['y'\]; it takes \['x0'\]"):
        executor.run({"x0": torch.ones(4), "y": 1})
    with pytest.raises(ValueError, match=r"torch.float64 of shape \(4,\); the program was made for torch.float32 of shape \(4,\)"):
        executor.run({"x0": torch.ones(4, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"of shape \(5,\)"):
        executor.run({"x0": torch.ones(5)})
    with pytest.raises(ValueError, match=r"is a list; a tensor"):
        executor.run({"x0": [1.0]})


def test_state_and_optimizer_must_be_given():
    program = linear_program(mesh=(1,))
    executor = Executor(program, AxisGroups((1,)))
    with pytest.raises(RuntimeError, match="has no state yet"):
        executor.run({"x": torch.ones(8, 4)})
    state = ProgramState.from_model(program, Linear(), (0,))
    with pytest.raises(ValueError, match="updates its parameters with AdamW: give the executor the optimizer"):
        executor.state = state
    with pytest.raises(ValueError, match="compiled for AdamW, the optimizer given is a SGD"):
        Executor(program, AxisGroups((1,)), optimizer=optimizer_of("SGD", Linear().parameters()), state=state)


def test_reading_a_value_after_its_update_is_our_mistake():
    program = linear_program()
    node = next(n for n in program.graph.nodes if n.target is update.fused_update)
    check_updates_last(program.graph)
    with program.graph.inserting_after(node):
        program.graph.call_function(aten.neg.default, (node.args[0][0],))
    with pytest.raises(AssertionError, match="reads w after fused_update has updated it in place"):
        check_updates_last(program.graph)


def test_axes_of_a_program():
    assert program_axes(linear_program().graph) == [(0,)]


def test_a_collective_nobody_waits_for_is_left_out():
    def build(graph, x):
        graph.call_function(co.all_reduce, (x, (0,)))
        return (x,)

    assert "all_reduce" not in write(one_op_program(build).graph).constants.values().__repr__()


def test_without_a_job_a_mesh_is_refused():
    with pytest.raises(GroupError, match=r"mesh 2x2 needs 4 ranks, but torch.distributed is not initialised.*torchrun --nproc-per-node 4"):
        AxisGroups((2, 2))


def test_a_rank_that_stops_does_not_leave_the_other_waiting():
    output = launch("execute_worker.py", "stop", num_ranks=2, timeout_s=60)
    assert "rank 0 refused: a collective did not complete" in output
    assert "rank 0 refused: the ranks could not be asked whether they agree" in output
