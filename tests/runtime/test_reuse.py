"""Gathered parameters go into the memory of the old ones only where nothing reads that afterwards."""

import operator

import pytest
import torch
from torch import fx

from opweave.runtime import collectives as co
from opweave.runtime import update
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.reuse import gathers_in_place
from opweave.runtime.sharding import ShardSpec, replicated
from opweave.runtime.state import ProgramState

from .programs import Linear, aten, linear_program

MESH = (2,)


def names(program):
    return {gather.name: {at: old.name for at, old in olds.items()} for gather, olds in gathers_in_place(program).items()}


def test_a_split_update_is_gathered_in_place():
    assert names(linear_program(zero=2)) == {"all_gather": {0: "w"}}
    assert names(linear_program(zero=3)) == {}, "this gather is of the old weight, for use"


@pytest.mark.parametrize("view", [aten.t.default, aten.detach.default, aten._unsafe_view.default, torch.Tensor.t])
def test_a_view_that_is_read_later_forbids_it(view):
    program = linear_program(zero=2)
    graph = program.graph
    weight = next(n for n in graph.nodes if n.name == "w")
    out = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_after(weight):
        seen = graph.call_function(view, (weight, [16]) if view is aten._unsafe_view.default else (weight,))
    assert names(program) == {"all_gather": {0: "w"}}, "an unused view reads nothing"
    with graph.inserting_before(out):
        late = graph.call_function(aten.sum.default, (seen,))
    out.args = ((late, *out.args[0][1:]),)
    assert names(program) == {}


def test_a_fresh_copy_that_is_read_later_does_not():
    program = linear_program(zero=2)
    graph = program.graph
    weight = next(n for n in graph.nodes if n.name == "w")
    out = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_after(weight):
        copy = graph.call_function(aten.mul.Tensor, (weight, 2))
    with graph.inserting_before(out):
        late = graph.call_function(aten.sum.default, (copy,))
    out.args = ((late, *out.args[0][1:]),)
    assert names(program) == {"all_gather": {0: "w"}}


def bucket_program() -> LocalProgram:
    """Two weights, one update, each gathered by itself and in a bucket with others."""
    graph = fx.Graph()
    coords, *weights = [graph.placeholder(name) for name in ("coords", "a", "b", "c")]
    pieces = [graph.call_function(co.take_shard, (w, coords, (0,), MESH, 0, 1)) for w in weights]
    new = graph.call_function(update.fused_update, (pieces, pieces, [[], [], []], "SGD", 0, ["a", "b", "c"]))
    parts = [graph.call_function(operator.getitem, (new, i)) for i in range(3)]
    first = graph.call_function(co.wait, (graph.call_function(co.all_gather, (parts[0], (0,), 0, 1)),))
    bucket = graph.call_function(co.wait, (graph.call_function(co.all_gather_bucket, (parts[1:], (0,), [0, 0], [1, 1])),))
    graph.output((first, *[graph.call_function(operator.getitem, (bucket, i)) for i in (1, 0)]))
    a, b, c = (Port(name=n, kind="param", fqn=n, spec=replicated((4,), MESH)) for n in "abc")
    return LocalProgram(mesh=MESH, graph=graph, inputs=(a, b, c), outputs=(a, c, b))


def test_each_weight_of_one_update_by_its_own_place():
    assert names(bucket_program()) == {"all_gather": {0: "a"}, "all_gather_bucket": {1: "c", 0: "b"}}


def test_another_layout_or_type_is_new_memory():
    program = bucket_program()
    split = ShardSpec(shape=(4,), factors=((4,),), axes=((0, 0),), mesh=MESH)
    program.outputs = (Port(name="a", kind="param", fqn="a", spec=split), *program.outputs[1:])
    assert "all_gather" not in names(program)


def test_the_models_own_memory_is_kept():
    model = Linear()
    state = ProgramState.from_model(linear_program(mesh=(1,)), model, (0,), share=True)
    with torch.no_grad():
        state.put(("param", "w", ""), torch.ones(4, 4))
    assert bool((model.w == 1).all())
    other = torch.zeros(4, 4)
    state.put(("state", "w", "exp_avg"), other)
    assert state.tensors["state", "w", "exp_avg"] is other
