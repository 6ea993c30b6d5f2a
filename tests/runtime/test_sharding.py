"""ShardSpec: pieces of a factored tensor, and back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from opweave.runtime.program import LocalProgram, Port, shard_inputs
from opweave.runtime.sharding import ShardSpec, replicated, unravel


@st.composite
def specs(draw, partial=False):
    mesh = draw(st.sampled_from([(1,), (2,), (4,), (2, 2), (3, 2), (2, 1, 2)]))
    unit = math.prod(mesh)
    one_dim = st.lists(st.sampled_from([1, 3, unit]), min_size=1, max_size=3).map(tuple)
    factors = tuple(draw(st.lists(one_dim, max_size=3)))
    splits = [(dim, i) for dim, parts in enumerate(factors) for i, size in enumerate(parts) if size % unit == 0]
    kinds = [None, *splits, *([draw(st.sampled_from(["sum", "max", "min"]))] if partial else [])]
    axes = tuple(draw(st.sampled_from(kinds)) for _ in mesh)
    return ShardSpec(shape=tuple(map(math.prod, factors)), factors=factors, axes=axes, mesh=mesh)


def numbered(spec):
    return torch.arange(math.prod(spec.shape), dtype=torch.float64).reshape(spec.shape)


def coordinates(spec):
    return [unravel(rank, spec.mesh) for rank in range(math.prod(spec.mesh))]


@settings(max_examples=100, deadline=None)
@given(specs())
def test_unshard_undoes_shard(spec):
    full = numbered(spec)
    pieces = [spec.shard(full, coords) for coords in coordinates(spec)]
    assert all(tuple(piece.shape) == spec.local_shape() for piece in pieces)
    assert torch.equal(spec.unshard(pieces), full)


@settings(max_examples=100, deadline=None)
@given(specs())
def test_pieces_cover_every_element_equally_often(spec):
    counts = torch.zeros(max(1, math.prod(spec.shape)), dtype=torch.int64)
    for coords in coordinates(spec):
        held = spec.shard(numbered(spec), coords).reshape(-1).long()
        counts.index_add_(0, held, torch.ones_like(held))
    assert counts.min() == counts.max()


@settings(max_examples=100, deadline=None)
@given(specs(partial=True))
def test_partials_are_combined_once_per_copy(spec):
    """Each device's share is random; devices that hold copies hold equal ones."""
    plain = tuple(None if isinstance(entry, str) else entry for entry in spec.axes)
    kinds = {entry for entry in spec.axes if isinstance(entry, str)}
    function = {"max": torch.maximum, "min": torch.minimum}.get(next(iter(kinds), "sum"), torch.add)
    cut = ShardSpec(shape=spec.shape, factors=spec.factors, axes=plain, mesh=spec.mesh)
    shares = {}
    for coords in coordinates(spec):
        part = tuple(at for entry, at in zip(spec.axes, coords, strict=True) if isinstance(entry, str))
        shares.setdefault(part, torch.randn(spec.shape, generator=torch.Generator().manual_seed(hash(part) % 1000), dtype=torch.float64))
    whole = None
    for share in shares.values():
        whole = share if whole is None else function(whole, share)
    pieces = []
    for coords in coordinates(spec):
        part = tuple(at for entry, at in zip(spec.axes, coords, strict=True) if isinstance(entry, str))
        pieces.append(cut.shard(shares[part], coords))
    assert torch.allclose(spec.unshard(pieces), whole, rtol=1e-12)


def test_heads_of_a_fused_weight():
    """A split of the middle factor takes every device's heads of q, k and v."""
    spec = ShardSpec(shape=(12,), factors=((3, 2, 2),), axes=((0, 1),), mesh=(2,))
    assert spec.shard(torch.arange(12), (1,)).tolist() == [2, 3, 6, 7, 10, 11]


def test_two_axes_on_one_factor_nest_in_axis_order():
    spec = ShardSpec(shape=(8,), factors=((8,),), axes=((0, 0), (0, 0)), mesh=(2, 2))
    assert [spec.shard(torch.arange(8), coords).tolist() for coords in ((0, 1), (1, 0))] == [[2, 3], [4, 5]]


def test_partial_maxima_of_integers():
    spec = ShardSpec(shape=(2,), factors=((2,),), axes=("max",), mesh=(2,))
    assert spec.unshard([torch.tensor([-3, 5]), torch.tensor([-1, 2])]).tolist() == [-1, 5]


def test_mistakes():
    with pytest.raises(AssertionError, match="do not multiply to 6"):
        ShardSpec(shape=(6,), factors=((2, 2),), axes=(None,), mesh=(2,))
    with pytest.raises(AssertionError, match="factor 3 of dim 0 cut in 2"):
        ShardSpec(shape=(3,), factors=((3,),), axes=((0, 0),), mesh=(2,))
    with pytest.raises(ValueError, match=r"shape \(3,\) was given where \(4,\) is expected"):
        replicated((4,), (2,)).shard(torch.ones(3), (0,))
    partial = ShardSpec(shape=(4,), factors=((4,),), axes=("sum",), mesh=(2,))
    with pytest.raises(ValueError, match="a partial layout has no pieces"):
        partial.shard(torch.ones(4), (0,))


def test_inputs_of_a_program_are_cut_by_name():
    spec = ShardSpec(shape=(4,), factors=((4,),), axes=((0, 0),), mesh=(2,))
    ports = (Port(name="x", kind="batch", fqn="input_ids", spec=spec), Port(name="seed", kind="seed", fqn=""))
    program = LocalProgram(mesh=(2,), graph=fx.Graph(), inputs=ports, outputs=())
    got = shard_inputs(program, {"x": torch.arange(4), "seed": 7}, (1,))
    assert got["x"].tolist() == [2, 3] and got["seed"] == 7
    with pytest.raises(ValueError, match=r"input 'input_ids': a tensor of shape \(3,\)"):
        shard_inputs(program, {"x": torch.arange(3)}, (0,))
