"""Forced plans do what their names say: who holds what of parameters, gradients and optimizer state, and which ops split what."""

import functools
from types import SimpleNamespace

import pytest
import torch

from opweave import zoo
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.factors import is_getitem
from opweave.compiler.force import op_atom_ids, quantities, recipes_per_axis
from opweave.compiler.planner import plan_step
from opweave.compiler.rule import tensor_args
from opweave.compiler.rule_table import op_name
from opweave.cost_model.cluster import Cluster


@functools.cache
def analysis(name="opt-tiny", size=None):
    model, batch = zoo.load(name, size)
    return analyse(capture(model, batch, optimizer=torch.optim.AdamW(model.parameters())))


@functools.cache
def forced(name, mesh=(2,), model=("opt-tiny", None)):
    """What a forced plan decided, per mesh axis as sets of what occurs."""
    a = analysis(*model)
    plan = plan_step(a, Cluster.preset("dgx-a100-640", devices=torch.Size(mesh).numel()), mesh=mesh, force=name)
    assignment = plan.assignment(a.step, a.factors)
    inputs = dict(zip((n for n in a.step.graph.nodes if n.op == "placeholder"), a.step.inputs, strict=True))
    updates = [n for n in a.step.ops if op_name(n) == "opweave::update.default"]
    known = quantities(a.step, a.factors)
    split = []  # per axis: the quantities that ops outside the update split
    for axis in range(len(mesh)):
        found = set()
        for node, strategy in assignment.ops.items():
            if strategy.codes[axis] >= 0 and node not in updates and not is_getitem(node):
                found.add(op_atom_ids(node, a.factors.bind(node), a.factors)[strategy.codes[axis]])
        split.append(found)
    return SimpleNamespace(
        params=[assignment.inputs[tensor_args(n)[0]] for n in updates],
        grads=[assignment.kept[tensor_args(n)[1]] for n in updates],
        states=[assignment.ops[n].operands[2] for n in updates],
        reads=[code for (v, _), code in assignment.reads.items() if inputs.get(v) is not None and inputs[v].kind == "param"],
        split=split, batch=known.batch, sequence=known.sequence, plan=plan,
    )  # fmt: skip


def splits(layouts, axis=0):
    return sum(layout[axis] >= 0 for layout in layouts)


def test_quantities():
    known = quantities(analysis().step, analysis().factors)
    # The labels are shifted by padding and cutting, so their sequence is a quantity of its own.
    assert len(known.batch) == 1 and len(known.sequence) == 2 and not known.batch & known.sequence


@pytest.mark.parametrize(
    ("name", "params", "grads", "states"),
    [("ddp", False, False, False), ("zero1", False, False, True), ("zero2", False, True, True), ("zero3", True, True, True)],
)
def test_data_parallel_recipes(name, params, grads, states):
    """Only the batch is split; parameters, gradients and state are in pieces exactly where the name says so."""
    f = forced(name)
    assert f.split[0] == set(f.batch)
    total = len(f.params)
    assert splits(f.params) == (total if params else 0)
    assert splits(f.states) == (total if states else 0)
    assert splits(f.grads) == (total if grads else 0)
    assert splits(f.reads) == 0, "parameters are whole where they are read"


@pytest.mark.parametrize("name", ["megatron", "megatron_sp"])
def test_tensor_parallel_recipes(name):
    """Weights are in pieces and read as such; the batch is never split, the sequence only by megatron_sp."""
    f = forced(name, model=("opt-125m", (1, 1024)))  # long enough for a split of the sequence to pay
    assert not f.split[0] & f.batch
    assert bool(f.split[0] & f.sequence) == (name == "megatron_sp")
    assert f.split[0] - f.batch - f.sequence, "nothing is tensor parallel"
    assert splits(f.params) > len(f.params) / 4
    assert splits(f.reads) > 0


def test_megatron_shares_the_work_of_every_block():
    """Column then row: both products of the feed-forward and attention's heads are split."""
    f = forced("megatron")
    names = " ".join(d.path for d in f.plan.decisions if d.kind == "op" and d.codes[0] >= 0 and d.phase == "fwd")
    for part in ("fc1", "fc2", "q_proj", "out_proj"):
        assert part in names


def test_two_dimensions():
    """Axis 0 as zero3, axis 1 as megatron."""
    f = forced("zero3+megatron", (2, 2))
    assert f.split[0] == set(f.batch)
    assert not f.split[1] & f.batch
    assert splits(f.params, 0) > len(f.params) * 0.9  # a few are too small to be cut by both axes
    assert splits(f.params, 1) > 0


def test_replicate():
    f = forced("replicate")
    assert f.split == [set()] and not splits(f.params) and not splits(f.states)


def test_meshes_without_as_many_axes_are_left_out():
    plan = plan_step(analysis(), Cluster.preset("dgx-a100-640", devices=4), force="zero3+megatron")
    assert plan.mesh == (2, 2)
    with pytest.raises(ValueError, match="has 3 parts"):
        plan_step(analysis(), Cluster.preset("dgx-a100-640", devices=4), force="zero3+ddp+megatron")


@pytest.mark.parametrize(
    ("name", "axes", "recipes"),
    [("ddp", 2, ("ddp", "ddp")), ("megatron", 2, ("ddp", "megatron")), ("megatron", 1, ("megatron",)), ("zero1+ddp", 2, ("zero1", "ddp"))],
)
def test_recipes_per_axis(name, axes, recipes):
    assert recipes_per_axis(name, axes) == recipes
