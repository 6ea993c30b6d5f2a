"""Layout changes: the steps lead from every layout to every other, and what lowering makes of them is what `ShardSpec` says."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from opweave.compiler.factors import FactorMap
from opweave.compiler.layout import PARTIAL, REPLICATED, fits, is_partial, spec_of
from opweave.compiler.lower import Assignment, Lowering
from opweave.compiler.reshard import ReshardError, Step, steps
from opweave.compiler.step_graph import GraphInput, GraphOutput, StepGraph
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import ShardSpec, unravel
from opweave.runtime.state import ProgramState

ATOMS = (8, 8, 8)
MESHES = [(2,), (4,), (2, 2), (2, 4), (2, 2, 2)]


def layouts(mesh, partial=True):
    codes = [REPLICATED, *range(len(ATOMS)), *([PARTIAL["sum"]] if partial else [])]
    return [layout for layout in itertools.product(codes, repeat=len(mesh)) if fits(layout, ATOMS, mesh)]


def pairs():
    return [(mesh, a, b) for mesh in MESHES for a in layouts(mesh) for b in layouts(mesh)]


def test_steps_lead_from_source_to_target():
    """Every step starts where the one before ended and changes one axis; the last ends at the target."""
    count = 0
    for mesh, source, target in pairs():
        at = source
        for step in steps(source, target, mesh):
            assert step.before == at and at[step.axis] == step.source != step.target
            at = tuple(step.target if axis == step.axis else code for axis, code in enumerate(at))
            assert fits(at, ATOMS, mesh)
        assert at == target
        count += 1
    assert count > 10_000


def test_axes_enter_and_leave_an_atom_innermost_first():
    """Axes on one atom nest in axis order, so no step may change one while a higher axis is on the same atom."""
    for mesh, source, target in pairs():
        for step in steps(source, target, mesh):
            for code in (step.source, step.target):
                assert code < 0 or all(step.before[axis] != code for axis in range(step.axis + 1, len(mesh)))


def test_no_steps_where_nothing_changes_and_one_where_one_does():
    for mesh in MESHES:
        for layout in layouts(mesh):
            assert steps(layout, layout, mesh) == ()
    kinds = {
        ((-1,), (0,)): "slice", ((0,), (-1,)): "all_gather", ((-2,), (-1,)): "all_reduce", ((-2,), (1,)): "reduce_scatter",
        ((0,), (1,)): "all_to_all", ((-1,), (-2,)): "zero",
    }  # fmt: skip
    for (source, target), kind in kinds.items():
        assert [step.kind for step in steps(source, target, (2,))] == [kind]
    assert [step.kind for step in steps((0,), (-2,), (2,))] == ["all_gather", "zero"]


def test_cheap_steps_come_first():
    """A slice on one axis halves what the other axis gathers."""
    first, second = steps((0, -1), (-1, 1), (2, 4))
    assert (first.kind, second.kind) == ("slice", "all_gather")
    assert second == Step("all_gather", 0, 0, -1, (0, 1), 1 / 4)


def test_fraction_is_what_a_group_works_on():
    for mesh, source, target in pairs():
        for step in steps(source, target, mesh):
            others = math.prod(mesh[axis] for axis, code in enumerate(step.before) if code >= 0 and axis != step.axis)
            assert step.fraction == pytest.approx(1 / others)


@pytest.mark.parametrize(("source", "target"), [((-1,), (-3,)), ((0,), (-3,)), ((-2,), (-3,)), ((-3,), (-2,)), ((-1,), (-4,))])
def test_no_way_into_a_maximum(source, target):
    with pytest.raises(ReshardError, match="code"):
        steps(source, target, (2,))
    assert [step.kind for step in steps((-3,), (0,), (2,))] == ["reduce_scatter"]


# -- through the real lowering --------------------------------------------------------------------------------------------


def lowered(mesh, source, target):
    """A program that takes a tensor (8, 6) = (2*4, 3*2) in one layout and returns it in another, and its specs."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, 6, dtype=torch.float64)
    graph.output((x,))
    factors = FactorMap(graph, {})
    classes = factors._dims[x]
    for cls, bound in zip(classes, (4, 2), strict=True):
        factors._classes.add_bound(cls, bound)
    factors._cache.clear()
    assert factors.dims(x) == ((2, 4), (3, 2)) and factors.atoms(x) == (2, 4, 3, 2)
    lowering = Lowering(StepGraph(graph=graph, inputs=(), outputs=(GraphOutput(kind="extra"),)), factors, Assignment(mesh=mesh))
    local = lowering.e.graph.placeholder("x")
    lowering._infos[x] = GraphInput(name="x", kind="batch", fqn="x")
    later = lowering.layouts.reshard(x, local, source, target)
    lowering.e.graph.output((later(),))
    specs = [lowering.spec(x, layout) for layout in (source, target)]
    given = Port(name="x", kind="batch", fqn="x", dtype=torch.float64, spec=specs[0])
    made = Port(name="out", kind="extra", fqn="", dtype=torch.float64, spec=specs[1])
    return LocalProgram(mesh=mesh, graph=lowering.e.graph, inputs=(given,), outputs=(made,)), specs


def pieces_of(spec, value):
    """All ranks' pieces; partial sums as different summands that add up to the value."""
    axes = [axis for axis, entry in enumerate(spec.axes) if isinstance(entry, str)]
    ranks = [unravel(rank, spec.mesh) for rank in range(math.prod(spec.mesh))]
    splits = tuple(None if isinstance(entry, str) else entry for entry in spec.axes)
    whole = ShardSpec(shape=spec.shape, factors=spec.factors, axes=splits, mesh=spec.mesh)
    places = sorted({tuple(coords[axis] for axis in axes) for coords in ranks})
    noise = torch.randint(-9, 9, (len(places), *value.shape), generator=torch.Generator().manual_seed(0)).to(value.dtype)
    noise[-1] = value - noise[:-1].sum(0)
    at = {place: noise[i] for i, place in enumerate(places)}
    return [whole.shard(at[tuple(coords[axis] for axis in axes)], coords).clone() for coords in ranks]


SMALL_ATOMS = (2, 4, 3, 2)


@st.composite
def changes(draw):
    mesh = draw(st.sampled_from([(2,), (4,), (3,), (2, 2), (2, 3), (2, 4), (2, 2, 2)]))
    codes = [REPLICATED, PARTIAL["sum"], 0, 1, 2, 3]
    layout = st.tuples(*(st.sampled_from(codes) for _ in mesh)).filter(lambda codes: fits(codes, SMALL_ATOMS, mesh))
    return mesh, draw(layout), draw(layout)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes())
def test_what_lowering_makes_is_the_same_tensor(change):
    """Integers in float64: equal, not nearly equal; on each rank the very piece, and partial sums that add up."""
    mesh, source, target = change
    program, (before, after) = lowered(mesh, source, target)
    value = torch.arange(48.0, dtype=torch.float64).reshape(8, 6)
    executor = LockstepExecutor(program)
    executor.states = [ProgramState(program, unravel(rank, mesh)) for rank in range(math.prod(mesh))]
    results = [result[0] for result in executor.run_local([{"x": piece} for piece in pieces_of(before, value)])]
    assert torch.equal(after.unshard(results), value)
    if not is_partial(target):
        for rank, result in enumerate(results):
            assert torch.equal(result, after.shard(value, unravel(rank, mesh)))


def test_spec_of_names_the_factor():
    spec = spec_of((2, -2), (8, 6), ((2, 4), (3, 2)), ((0, 0), (0, 1), (1, 0), (1, 1)), (3, 2))
    assert spec.axes == ((1, 0), "sum") and spec.local_shape() == (8, 2)
