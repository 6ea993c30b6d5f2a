"""Collectives and local layout changes of one rank: the functions a local graph calls.

Words. `axes`: the mesh axes whose devices form the group, in ascending order; the devices of a group are numbered row-major over
them (n devices). `dim`, `outer`: a dim is seen as (outer, rest), where `outer` is the product of the local sizes of the dim's
factors more major than the one that is cut. A tensor is then (lead * outer, rest * trail), lead and trail being the dims before
and after; each of these pieces of `rest` is cut into n, or put together from n.

    all_reduce      (d)            -> (d)              combined over the group
    all_gather      (outer*rest)   -> (outer*n*rest)   pieces side by side inside every outer index
    reduce_scatter  (outer*rest)   -> (outer*rest/n)   combined, then this device's piece
    all_to_all      split one dim as reduce_scatter does, join another as all_gather does; both `outer`s as they are before

These start the collective and return a `Pending`; `wait` returns the tensor. In a graph they are names: an executor binds them to the
`communicator.Communicator` of its rank, the lockstep executor computes them on lists. The `_bucket` forms move many tensors of one dtype at
once. The functions at the end (`take_shard`, ...) communicate nothing and run as they are.

Nothing is rearranged where lead * outer is 1 (a cut of the first dim): the collective then reads and writes the tensors themselves.
Combination is in group order wherever pieces are exchanged directly, so results do not depend on timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Axes = tuple[int, ...]

# In-place combination of two tensors, by the name used in graphs.
COMBINE: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class CommunicationError(RuntimeError):
    """A collective failed: another rank stopped, or did not answer in time."""


# ---------------------------------------------------------------------------------------------------------------- names in graphs


def _unbound(name: str) -> RuntimeError:
    return RuntimeError(
        f"collectives.{name} was called outside an executor, so it has no process group. Run the program with "
        "runtime.execute.Executor (one rank per process) or runtime.lockstep.LockstepExecutor (all ranks in this process)."
    )


def all_reduce(x: torch.Tensor, axes: Axes, op: str = "sum") -> Any:
    """Start combining `x` over the group with op "sum", "max" or "min"."""
    raise _unbound("all_reduce")


def all_gather(x: torch.Tensor, axes: Axes, dim: int, outer: int) -> Any:
    """Start putting the group's pieces together along `dim`."""
    raise _unbound("all_gather")


def reduce_scatter(x: torch.Tensor, axes: Axes, dim: int, outer: int, op: str = "sum") -> Any:
    """Start combining `x` over the group; this device gets its piece of `dim`."""
    raise _unbound("reduce_scatter")


def all_to_all(x: torch.Tensor, axes: Axes, split_dim: int, split_outer: int, gather_dim: int, gather_outer: int) -> Any:
    """Start moving the cut from `gather_dim` to `split_dim`."""
    raise _unbound("all_to_all")


def all_reduce_bucket(xs: list[torch.Tensor], axes: Axes, op: str = "sum") -> Any:
    """`all_reduce` of many tensors of one dtype in one message; `wait` gives the list."""
    raise _unbound("all_reduce_bucket")


def reduce_scatter_bucket(xs: list[torch.Tensor], axes: Axes, dims: list[int], outers: list[int], op: str = "sum") -> Any:
    """`reduce_scatter` of many tensors of one dtype in one message; `wait` gives the list."""
    raise _unbound("reduce_scatter_bucket")


def all_gather_bucket(xs: list[torch.Tensor], axes: Axes, dims: list[int], outers: list[int]) -> Any:
    """`all_gather` of many tensors of one dtype in one message; `wait` gives the list."""
    raise _unbound("all_gather_bucket")


class Pending:
    """A collective on its way.

    works: what to wait for. finish: gives the result once they are done. held: tensors that must live until then.
    """

    __slots__ = ("finish", "held", "works")

    def __init__(self, works: Sequence[Any], finish: Callable[[], Any], held: Sequence[torch.Tensor] = ()) -> None:
        self.works = works
        self.finish = finish
        self.held = held


def wait(pending: Any) -> Any:
    """The tensor (or list of tensors) of a started collective. Raises CommunicationError where the group broke."""
    if not isinstance(pending, Pending):
        return pending  # a group of one device, or a lockstep result
    try:
        for work in pending.works:
            work.wait()
    except RuntimeError as error:
        raise CommunicationError(
            f"a collective did not complete: {error}. Another rank of the group has stopped or is not at this point of the "
            "program; its own message, earlier in the output, says why."
        ) from error
    result = pending.finish()
    pending.held = ()
    return result


STARTS = (all_reduce, all_gather, reduce_scatter, all_to_all, all_reduce_bucket, reduce_scatter_bucket, all_gather_bucket)


# --------------------------------------------------------------------------------------------------------------- layout algebra


def cut(x: torch.Tensor, n: int, dim: int, outer: int) -> torch.Tensor:
    """(n, lead * outer, rest/n * trail): the n pieces of `x` (a view where possible; contiguous where lead * outer is 1)."""
    lead = math.prod(x.shape[:dim]) * outer
    assert x.shape[dim] % (outer * n) == 0, f"dim {dim} of {tuple(x.shape)} cut in {outer} x {n}"
    return x.reshape(lead, n, -1 if x.numel() else 0).transpose(0, 1)


def cut_shape(shape: torch.Size, n: int, dim: int) -> list[int]:
    """Shape of one of n pieces of `dim`."""
    out = list(shape)
    out[dim] //= n
    return out


def join(pieces: torch.Tensor, shape: Sequence[int], dim: int, outer: int) -> torch.Tensor:
    """The whole of n pieces, given as a contiguous (n, ...) tensor whose rows each have `shape`."""
    n = pieces.shape[0]
    whole = list(shape)
    whole[dim] *= n
    lead = math.prod(shape[:dim]) * outer
    if lead == 1:
        return pieces.view(whole)
    return pieces.view(n, lead, -1 if pieces.numel() else 0).transpose(0, 1).reshape(whole)


def outer_after_cut(n: int, split_dim: int, split_outer: int, gather_dim: int, gather_outer: int) -> int:
    """`gather_outer` once `split_dim` is cut into n: where a more major factor of the same dim is cut, it shrinks."""
    return gather_outer // n if split_dim == gather_dim and gather_outer > split_outer else gather_outer


def combine(pieces: Sequence[torch.Tensor], op: str, into: torch.Tensor) -> torch.Tensor:
    """Combine pieces in order into `into`, which may be one of the first two of them."""
    function = COMBINE[op]
    if len(pieces) == 1:
        return into.copy_(pieces[0])
    function(pieces[0], pieces[1], out=into)
    for piece in pieces[2:]:
        function(into, piece, out=into)
    return into


def pack(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Many tensors of one dtype as one flat tensor."""
    dtypes = {x.dtype for x in xs}
    assert len(dtypes) == 1, f"a bucket holds one dtype, not {sorted(map(str, dtypes))}"
    return torch.cat([x.reshape(-1) for x in xs])


def unpack(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Views of a flat tensor, one per shape."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape) if len(shape) else part.view(()) for part, shape in zip(parts, shapes, strict=True)]


def pack_cut(xs: Sequence[torch.Tensor], n: int, dims: Sequence[int], outers: Sequence[int]) -> torch.Tensor:
    """(n, sum of piece sizes): the pieces of many tensors, each row what one device gets."""
    return torch.cat([cut(x, n, dim, outer).reshape(n, -1) for x, dim, outer in zip(xs, dims, outers, strict=True)], dim=1)


def unpack_join(
    rows: torch.Tensor, shapes: Sequence[Sequence[int]], dims: Sequence[int], outers: Sequence[int]
) -> list[torch.Tensor]:
    """Inverse of packing on every device: (n, sum of piece sizes) → whole tensors."""
    parts = rows.split([math.prod(shape) for shape in shapes], dim=1)
    return [
        join(part.contiguous(), shape, dim, outer) for part, shape, dim, outer in zip(parts, shapes, dims, outers, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------ local, no communication


def piece_index(coords: Sequence[int], axes: Axes, sizes: Sequence[int]) -> int:
    """Row-major index of this device over `axes`, whose mesh sizes are `sizes`."""
    index = 0
    for axis, size in zip(axes, sizes, strict=True):
        index = index * size + coords[axis]
    return index


def take_shard(x: torch.Tensor, coords: Sequence[int], axes: Axes, sizes: Sequence[int], dim: int, outer: int) -> torch.Tensor:
    """This device's piece of `dim` (a view where possible): (outer*rest) → (outer*rest/n)."""
    n = math.prod(sizes)
    index = piece_index(coords, axes, sizes)
    if outer == 1:
        size = x.shape[dim] // n
        return x.narrow(dim, index * size, size)
    split = x.unflatten(dim, (outer, n, x.shape[dim] // (outer * n)))
    return split.select(dim + 1, index).flatten(dim, dim + 1)


def zero_unless_first(x: torch.Tensor, coords: Sequence[int], axes: Axes) -> torch.Tensor:
    """A replicated tensor as a partial sum: itself on the first device of the group, zeros on the others."""
    return x if all(coords[axis] == 0 for axis in axes) else torch.zeros_like(x)


def shard_offset(coords: Sequence[int], axes: Axes, sizes: Sequence[int], local_size: int) -> int:
    """Global index of the first element of this device's piece of a dim."""
    return piece_index(coords, axes, sizes) * local_size
