"""Programs of several micro-batches: what a round finds of the last one, what is summed, and what is alive when."""

import operator

import pytest
import torch
from torch import fx

from opweave.runtime import micro_batches, tiers
from opweave.runtime.dry_run import dry_run
from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.profile import record
from opweave.runtime.program import LocalProgram, Port, shard_inputs
from opweave.runtime.sharding import replicated
from opweave.runtime.state import ProgramState

aten = torch.ops.aten
MESH = (1,)
SIZE = 256


def program_of(num: int, *, on_host: bool = False, is_fresh: bool = True) -> LocalProgram:
    """Per micro-batch seen += x and total += 2x; behind them total / 10. Also returned: the last 2x."""
    graph = fx.Graph()
    graph.placeholder("coords")
    x, seen = graph.placeholder("x"), graph.placeholder("seen")
    call = graph.call_function
    new = call(aten.add.Tensor, (seen, x))
    twice = call(aten.mul.Tensor, (x, 2))
    if on_host:
        arrived = call(tiers.settle, (call(tiers.offload, (twice, "host")),))
        total = call(tiers.add_up, (arrived, torch.float32))
    else:
        total = call(micro_batches.accumulate, (twice, is_fresh))
    call(micro_batches.end, (("x",), [seen], [new]))
    if on_host:
        total = call(tiers.arrive, (call(tiers.fetch, (total,)),))
    graph.output((call(aten.div.Tensor, (total, 10)), call(aten.neg.default, (twice,)), new))
    spec = replicated((SIZE,), MESH)
    ports = {kind: Port(name=name, kind=kind, fqn=name, spec=spec) for name, kind in (("x", "batch"), ("seen", "buffer"), ("out", "extra"))}
    return LocalProgram(
        mesh=MESH, graph=graph, inputs=(ports["batch"], ports["buffer"]), outputs=(ports["extra"], ports["extra"], ports["buffer"]),
        num_micro_batches=num,
    )  # fmt: skip


def state_of(program: LocalProgram) -> ProgramState:
    return ProgramState.from_tensors(program, {("buffer", "seen", ""): torch.zeros(SIZE)}, (0,))


def parts(num: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": part} for part in torch.arange(num * SIZE, dtype=torch.float32).split(SIZE)]


@pytest.mark.parametrize("on_host", [False, True])
def test_rounds(on_host):
    program = program_of(3, on_host=on_host, is_fresh=False)  # `twice` is read behind the loop, too
    executor = Executor(program, AxisGroups(MESH), state=state_of(program))
    given = parts(3)
    for step in (1, 2):
        total, last = executor.run(given)
        expected = sum(part["x"] for part in given)
        assert torch.equal(total, 2 * expected / 10) and torch.equal(last, -2 * given[2]["x"])
        assert torch.equal(executor.state.value(("buffer", "seen", "")), step * expected)
    assert torch.equal(given[0]["x"], torch.arange(SIZE, dtype=torch.float32)), "what is brought is not written"
    executor.close()


def test_lockstep_runs_the_same():
    program = program_of(2, is_fresh=False)
    both = []
    for executor in (LockstepExecutor(program, states=[state_of(program)]), Executor(program, AxisGroups(MESH), state=state_of(program))):
        both.append(executor.run(parts(2)))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_sum_begins_in_its_first_operand_only_where_that_is_free():
    first, second = torch.ones(3), torch.ones(3)
    assert micro_batches.accumulate(None, first, True) is first
    copied = micro_batches.accumulate(None, second, False)
    assert copied is not second and micro_batches.accumulate(copied, first, True) is copied
    assert torch.equal(copied, torch.full((3,), 2.0)) and torch.equal(second, torch.ones(3))


def test_memory_is_that_of_the_worst_round():
    """Alive at the worst moment: the buffer and its last and next value, x, its double, and the sum."""
    program = program_of(5, is_fresh=False)
    executor = Executor(program, AxisGroups(MESH), state=state_of(program))
    executor.run(parts(5))
    assert executor.memory.peak_bytes == 6 * SIZE * 4 == dry_run(program).peak_bytes
    few = Executor(program_of(2, is_fresh=False), AxisGroups(MESH), state=state_of(program))
    few.run(parts(2))
    assert few.memory.peak_bytes == executor.memory.peak_bytes


def test_a_recording_has_every_round():
    program = program_of(3, is_fresh=False)
    executor = Executor(program, AxisGroups(MESH), state=state_of(program))
    _, spans = record(executor, parts(3))
    names = [name for name, _, _ in spans]
    assert names.count("mul_tensor") == 3 and names.count("div_tensor") == 1
    assert [begin for _, begin, _ in spans] == sorted(begin for _, begin, _ in spans)


@pytest.mark.parametrize("given", [parts(3)[0], parts(3)[:2]])
def test_too_few_micro_batches(given):
    program = program_of(3)
    executor = Executor(program, AxisGroups(MESH), state=state_of(program))
    with pytest.raises(ValueError, match=r"inputs of [12] micro-batches were given, the program runs 3 in a step"):
        executor.run(shard_inputs(program, given, (0,)))


def test_one_micro_batch_is_wrong():
    program = program_of(2)
    executor = Executor(program, AxisGroups(MESH), state=state_of(program))
    with pytest.raises(ValueError, match="this rank's part of the input 'x'"):
        executor.run([parts(2)[0], {"x": torch.ones(3)}])
    assert torch.equal(executor.state.value(("buffer", "seen", "")), torch.zeros(SIZE)), "nothing has run"


def test_names_are_names_only():
    assert micro_batches.end_of(program_of(2).graph) is not None and micro_batches.end_of(fx.Graph()) is None
    with pytest.raises(RuntimeError, match=r"micro_batches\.end marks a place in a program"):
        micro_batches.end((), [], [])
    with pytest.raises(RuntimeError, match=r"tiers\.add_up was called outside an executor"):
        tiers.add_up(None, operator.attrgetter, torch.float32)
