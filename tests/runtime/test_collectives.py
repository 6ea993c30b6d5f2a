"""Collectives: in lockstep they are what `ShardSpec` says they should be; the real ones equal the lockstep ones."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.runtime import collectives as co
from opweave.runtime import lockstep as ls
from opweave.runtime.groups import group_ranks
from opweave.runtime.sharding import ShardSpec, unravel

from .launch import launch

MESHES = [(2,), (4,), (2, 2), (2, 3)]


def outer_of(spec: ShardSpec, split: tuple[int, int]) -> int:
    dim, index = split
    return math.prod(spec.local_factors()[dim][:index])


def pieces_of(spec: ShardSpec, full: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's local tensor; a partial one is random shares that combine to `full`."""
    num_ranks = math.prod(spec.mesh)
    plain = ShardSpec(
        shape=spec.shape, factors=spec.factors, axes=tuple(None if isinstance(a, str) else a for a in spec.axes), mesh=spec.mesh
    )
    out = []
    for rank in range(num_ranks):
        coords = unravel(rank, spec.mesh)
        piece = plain.shard(full, coords).clone()
        for axis, entry in enumerate(spec.axes):
            if entry == "sum":
                piece = piece if coords[axis] == 0 else torch.zeros_like(piece)
            elif entry == "max":
                piece = piece if coords[axis] == spec.mesh[axis] - 1 else piece - 1 - coords[axis]
        out.append(piece)
    return out


@st.composite
def factored(draw):
    """A mesh, an axis, and a shape whose factors are divisible by every split of the mesh."""
    mesh = draw(st.sampled_from(MESHES))
    axis = draw(st.integers(0, len(mesh) - 1))
    unit = math.prod(mesh)
    factors = tuple(
        tuple(unit * draw(st.integers(1, 2)) if draw(st.booleans()) else unit for _ in range(draw(st.integers(1, 2)))) for _ in range(2)
    )
    splits = [(dim, i) for dim, parts in enumerate(factors) for i in range(len(parts))]
    others = [None if draw(st.booleans()) else draw(st.sampled_from(splits)) for _ in mesh]
    return mesh, axis, factors, splits, others, draw(st.sampled_from(splits)), draw(st.sampled_from(splits))


def make_spec(mesh, factors, axes) -> ShardSpec:
    return ShardSpec(shape=tuple(map(math.prod, factors)), factors=factors, axes=tuple(axes), mesh=mesh)


def innermost(axes, axis, split) -> bool:
    """An axis may enter or leave a factor only where no higher axis is on it."""
    return all(entry != split for entry in axes[axis + 1 :])


def run(function, pieces, mesh, axes, **options) -> list[torch.Tensor]:
    out: list = [None] * len(pieces)
    for ranks in group_ranks(mesh, axes):
        for rank, answer in zip(ranks, ls.DEFINITIONS[function]([pieces[r] for r in ranks], **options), strict=True):
            out[rank] = answer
    return out


def check(spec: ShardSpec, pieces: list[torch.Tensor], full: torch.Tensor) -> None:
    for rank, (piece, expected) in enumerate(zip(pieces, pieces_of(spec, full), strict=True)):
        assert torch.equal(piece, expected), f"rank {rank}: {piece} instead of {expected}"


def numbered(spec: ShardSpec) -> torch.Tensor:
    return torch.arange(math.prod(spec.shape), dtype=torch.float64).reshape(spec.shape)


@settings(max_examples=40, deadline=None)
@given(factored())
def test_all_gather_removes_a_split(case):
    mesh, axis, factors, _, axes, split, _ = case
    if not innermost(axes, axis, split):
        return
    axes[axis] = split
    before = make_spec(mesh, factors, axes)
    axes[axis] = None
    after = make_spec(mesh, factors, axes)
    full = numbered(before)
    check(after, run(co.all_gather, pieces_of(before, full), mesh, (axis,), dim=split[0], outer=outer_of(before, split)), full)


@settings(max_examples=40, deadline=None)
@given(factored(), st.sampled_from(["sum", "max"]))
def test_reduce_scatter_makes_a_split_of_a_partial(case, op):
    mesh, axis, factors, _, axes, split, _ = case
    if not innermost(axes, axis, split):
        return
    axes[axis] = op
    before = make_spec(mesh, factors, axes)
    axes[axis] = split
    after = make_spec(mesh, factors, axes)
    full = numbered(before)
    got = run(co.reduce_scatter, pieces_of(before, full), mesh, (axis,), dim=split[0], outer=outer_of(before, split), op=op)
    check(after, got, full)


@settings(max_examples=40, deadline=None)
@given(factored())
def test_all_to_all_moves_a_split(case):
    mesh, axis, factors, _, axes, source, target = case
    if source == target or not innermost(axes, axis, source) or not innermost(axes, axis, target):
        return
    axes[axis] = source
    before = make_spec(mesh, factors, axes)
    axes[axis] = target
    after = make_spec(mesh, factors, axes)
    full = numbered(before)
    options = {
        "split_dim": target[0],
        "split_outer": outer_of(before, target),
        "gather_dim": source[0],
        "gather_outer": outer_of(before, source),
    }
    check(after, run(co.all_to_all, pieces_of(before, full), mesh, (axis,), **options), full)


@settings(max_examples=20, deadline=None)
@given(factored(), st.sampled_from(["sum", "max"]))
def test_all_reduce_completes_a_partial(case, op):
    mesh, axis, factors, _, axes, _, _ = case
    axes[axis] = op
    before = make_spec(mesh, factors, axes)
    axes[axis] = None
    full = numbered(before)
    check(make_spec(mesh, factors, axes), run(co.all_reduce, pieces_of(before, full), mesh, (axis,), op=op), full)


@settings(max_examples=40, deadline=None)
@given(factored())
def test_take_shard_is_the_layouts_piece(case):
    mesh, axis, factors, _, axes, split, _ = case
    if not innermost(axes, axis, split):
        return
    axes[axis] = None
    before = make_spec(mesh, factors, axes)
    axes[axis] = split
    after = make_spec(mesh, factors, axes)
    full = numbered(before)
    got = [
        co.take_shard(piece, unravel(rank, mesh), (axis,), (mesh[axis],), split[0], outer_of(before, split))
        for rank, piece in enumerate(pieces_of(before, full))
    ]
    check(after, got, full)


def test_groups_differ_only_on_their_axes():
    assert group_ranks((2, 3), (1,)) == [(0, 1, 2), (3, 4, 5)]
    assert group_ranks((2, 3), (0,)) == [(0, 3), (1, 4), (2, 5)]
    assert group_ranks((2, 2, 2), (0, 2)) == [(0, 1, 4, 5), (2, 3, 6, 7)]


def test_gather_over_two_axes_is_the_nested_split():
    mesh, factors = (2, 2), ((8,), (3,))
    before = make_spec(mesh, factors, [(0, 0), (0, 0)])
    full = numbered(before)
    check(make_spec(mesh, factors, [None, None]), run(co.all_gather, pieces_of(before, full), mesh, (0, 1), dim=0, outer=1), full)


@pytest.mark.parametrize("n", [2, 3])
def test_buckets_are_their_tensors_one_by_one(n):
    shapes, dims, outers = [(6, 4), (2, 6), (12,), ()], [0, 1, 0], [1, 1, 2]
    xs = [[torch.randn(shape) for shape in shapes] for _ in range(n)]
    per_tensor = [ls.all_reduce(list(values), "sum") for values in zip(*xs, strict=True)]
    for rank, values in enumerate(ls.all_reduce_bucket(xs, "sum")):
        assert all(map(torch.equal, values, [results[rank] for results in per_tensor]))
    xs = [x[:3] for x in xs]
    packed = [co.pack_cut(x, n, dims, outers) for x in xs]
    total = sum(packed[1:], packed[0])
    expected = ls.reduce_scatter_bucket(xs, dims, outers, "sum")
    for j in range(n):
        pieces = co.unpack(total[j], [x.shape for x in expected[j]])
        assert all(map(torch.equal, pieces, expected[j]))
    rows = torch.stack([co.pack(x) for x in xs])
    whole = co.unpack_join(rows, [x.shape for x in xs[0]], dims, outers)
    assert all(map(torch.equal, whole, ls.all_gather_bucket(xs, dims, outers)[0]))


def test_zero_unless_first_and_offset():
    x = torch.ones(2)
    got = [co.zero_unless_first(x, coords, (0, 1)) for coords in itertools.product(range(2), range(2))]
    assert [int(g.sum()) for g in got] == [2, 0, 0, 0]
    assert co.shard_offset((1, 2), (0, 1), (2, 3), 10) == 50


def test_a_collective_outside_an_executor_says_so():
    with pytest.raises(RuntimeError, match=r"all_reduce was called outside an executor"):
        co.all_reduce(torch.ones(1), (0,))


def test_real_collectives_equal_lockstep_on_two_ranks():
    assert "collectives ok" in launch("collectives_worker.py", "2", num_ranks=2)


@pytest.mark.slow
def test_real_collectives_equal_lockstep_on_a_two_by_two_mesh():
    assert "collectives ok" in launch("collectives_worker.py", "2x2", num_ranks=4)
