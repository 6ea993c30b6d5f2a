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
`Communicator` of its rank, the lockstep executor computes them on lists. The `_bucket` forms move many tensors of one dtype at
once. The functions at the end (`take_shard`, ...) communicate nothing and run as they are.

Nothing is rearranged where lead * outer is 1 (a cut of the first dim): the collective then reads and writes the tensors themselves.
Combination is in group order wherever pieces are exchanged directly, so results do not depend on timing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import torch_compat

if TYPE_CHECKING:
    from .groups import AxisGroups, Group

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


# ------------------------------------------------------------------------------------------------------------- transports: the wire


class DirectTransport:
    """Every device sends to every other directly; for gloo.

    Measured on 2 gloo ranks (64 KiB to 16 MiB): 2 to 3 times faster than gloo's own all-gather and reduce-scatter and up to 3 times
    faster than its all-reduce, since the message needs no worker thread and no staging copy. For more than two devices a direct
    all-reduce sends more bytes than a ring, so large ones go to gloo's own.
    """

    # Above this many bytes a ring wins over direct sends between more than two devices.
    RING_BYTES = 64 * 1024
    # From this many bytes on copying a tensor into a bucket costs more than a message of its own.
    SOLO_BYTES = 512 * 1024

    def __init__(self, group: Group) -> None:
        self.group = group
        # Everybody starts with the next neighbour, so that no device is everybody's first target.
        self.peers = [(group.index + step) % group.size for step in range(1, group.size)]

    def _swap(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> list[Any]:
        """Send outgoing[j] to device j and receive incoming[j]; the own places are not looked at."""
        process_group = self.group.process_group
        works = [process_group.recv([incoming[peer]], peer, 0) for peer in self.peers]
        works += [process_group.send([outgoing[peer]], peer, 0) for peer in self.peers]
        return works

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> list[Any]:
        """Fill `rows`, contiguous (n, *x.shape); row `index` may be `x` itself."""
        works = self._swap([x] * self.group.size, rows.unbind())
        own = rows[self.group.index]
        if own.data_ptr() != x.data_ptr():
            own.copy_(x)
        return works

    def exchange(self, pieces: torch.Tensor) -> tuple[list[Any], torch.Tensor, Sequence[torch.Tensor]]:
        """Row j of `pieces` goes to device j; works, the rows that arrive, and what must be held."""
        out = [piece.contiguous() for piece in pieces.unbind()]
        rows = pieces.new_empty(pieces.shape)
        works = self._swap(out, rows.unbind())
        rows[self.group.index].copy_(out[self.group.index])
        return works, rows, out

    def all_reduce(self, x: torch.Tensor, op: str) -> Pending:
        """Combine `x` (contiguous) over the group; `x` stays as it is."""
        if self.group.size > 2 and x.numel() * x.element_size() > self.RING_BYTES:
            return _native_all_reduce(self.group, x, op)
        return self._combined([x] * self.group.size, op)

    def reduce_scatter(self, pieces: torch.Tensor, op: str) -> Pending:
        """Combine row `index` of every device's `pieces`."""
        return self._combined([piece.contiguous() for piece in pieces.unbind()], op)

    def _combined(self, outgoing: Sequence[torch.Tensor], op: str) -> Pending:
        index = self.group.index
        rows = [piece if j == index else torch.empty_like(piece) for j, piece in enumerate(outgoing)]
        works = self._swap(outgoing, rows)
        # The result takes the place of a received piece: own ones may be the program's tensors.
        into = rows[1 if index == 0 else 0]
        return Pending(works, functools.partial(combine, rows, op, into), (*outgoing, *rows))


def _native_all_reduce(group: Group, x: torch.Tensor, op: str) -> Pending:
    out = x.clone(memory_format=torch.contiguous_format)
    work = torch.distributed.all_reduce(out, _REDUCE_OP[op], group=group.process_group, async_op=True)
    return Pending((work,), lambda: out, (out,))


_REDUCE_OP = {
    "sum": torch.distributed.ReduceOp.SUM,
    "max": torch.distributed.ReduceOp.MAX,
    "min": torch.distributed.ReduceOp.MIN,
}


class NativeTransport:
    """The backend's own collectives; for NCCL."""

    SOLO_BYTES = math.inf

    def __init__(self, group: Group) -> None:
        self.group = group

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> list[Any]:
        """Fill `rows`, contiguous (n, *x.shape); row `index` may be `x` itself."""
        return [torch_compat.all_gather_single(rows.view(-1), x.view(-1), group=self.group.process_group, async_op=True)]

    def exchange(self, pieces: torch.Tensor) -> tuple[list[Any], torch.Tensor, Sequence[torch.Tensor]]:
        """Row j of `pieces` goes to device j; works, the rows that arrive, and what must be held."""
        out = pieces.contiguous()
        rows = torch.empty_like(out)
        work = torch.distributed.all_to_all_single(rows, out, group=self.group.process_group, async_op=True)
        return [work], rows, (out,)

    def all_reduce(self, x: torch.Tensor, op: str) -> Pending:
        """Combine `x` over the group; `x` stays as it is."""
        return _native_all_reduce(self.group, x, op)

    def reduce_scatter(self, pieces: torch.Tensor, op: str) -> Pending:
        """Combine row `index` of every device's `pieces`."""
        whole = pieces.contiguous()
        out = whole.new_empty(whole.shape[1:])
        work = torch_compat.reduce_scatter_single(
            out.view(-1), whole.view(-1), _REDUCE_OP[op], group=self.group.process_group, async_op=True
        )
        return Pending((work,), lambda: out, (whole, out))


class Communicator:
    """The collectives of one rank. Methods are the graph functions of the same name.

    native: use the backend's own collectives; by default those of NCCL, and direct sends on gloo.
    """

    def __init__(self, groups: AxisGroups, *, native: bool | None = None) -> None:
        self.groups = groups
        self._kind = NativeTransport if (groups.backend == "nccl" if native is None else native) else DirectTransport
        self._transports: dict[Axes, DirectTransport | NativeTransport | None] = {}

    def transport(self, axes: Axes) -> DirectTransport | NativeTransport | None:
        """The wire of a group; None where it is one device. The group must have been prepared."""
        key = tuple(axes)
        if key not in self._transports:
            group = self.groups.group(key)
            self._transports[key] = self._kind(group) if group.size > 1 else None
        return self._transports[key]

    def bindings(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What an executor calls instead of the graph's functions."""
        return {function: getattr(self, function.__name__) for function in STARTS}

    def all_reduce(self, x: torch.Tensor, axes: Axes, op: str = "sum") -> Any:
        wire = self.transport(axes)
        return x if wire is None else wire.all_reduce(x.contiguous(), op)

    def all_gather(self, x: torch.Tensor, axes: Axes, dim: int, outer: int, into: torch.Tensor | None = None) -> Any:
        """into: memory for the result, which may hold `x` in its place (see `reuse`)."""
        wire = self.transport(axes)
        if wire is None:
            return x
        x = x.contiguous()
        shape = (wire.group.size, *x.shape)
        in_place = into is not None and math.prod(x.shape[:dim]) * outer == 1 and into.is_contiguous()
        rows = into.view(shape) if into is not None and in_place else x.new_empty(shape)
        works = wire.gather(x, rows)
        if into is None:
            return Pending(works, functools.partial(join, rows, x.shape, dim, outer), (x, rows))
        return Pending(works, lambda: into if in_place else into.copy_(join(rows, x.shape, dim, outer)), (x, rows))

    def reduce_scatter(self, x: torch.Tensor, axes: Axes, dim: int, outer: int, op: str = "sum") -> Any:
        wire = self.transport(axes)
        if wire is None:
            return x
        n = wire.group.size
        shape = cut_shape(x.shape, n, dim)
        return _then(wire.reduce_scatter(cut(x, n, dim, outer), op), lambda piece: piece.view(shape))

    def all_to_all(
        self, x: torch.Tensor, axes: Axes, split_dim: int, split_outer: int, gather_dim: int, gather_outer: int
    ) -> Any:
        wire = self.transport(axes)
        if wire is None:
            return x
        n = wire.group.size
        works, rows, held = wire.exchange(cut(x, n, split_dim, split_outer))
        shape = cut_shape(x.shape, n, split_dim)
        outer = outer_after_cut(n, split_dim, split_outer, gather_dim, gather_outer)
        return Pending(works, functools.partial(join, rows, shape, gather_dim, outer), (*held, rows))

    def all_reduce_bucket(self, xs: list[torch.Tensor], axes: Axes, op: str = "sum") -> Any:
        wire = self.transport(axes)
        if wire is None:
            return xs

        def packed(chosen: list[torch.Tensor], _: list[int]) -> Pending:
            pending = wire.all_reduce(pack(chosen), op)
            return _then(pending, lambda flat: unpack(flat, [x.shape for x in chosen]))

        return _bucket(wire, xs, packed, lambda i: self.all_reduce(xs[i], axes, op))

    def reduce_scatter_bucket(
        self, xs: list[torch.Tensor], axes: Axes, dims: list[int], outers: list[int], op: str = "sum"
    ) -> Any:
        wire = self.transport(axes)
        if wire is None:
            return xs

        def packed(chosen: list[torch.Tensor], at: list[int]) -> Pending:
            n = wire.group.size
            shapes = [cut_shape(x.shape, n, dims[i]) for x, i in zip(chosen, at, strict=True)]
            rows = pack_cut(chosen, n, [dims[i] for i in at], [outers[i] for i in at])
            return _then(wire.reduce_scatter(rows, op), lambda flat: unpack(flat, shapes))

        return _bucket(wire, xs, packed, lambda i: self.reduce_scatter(xs[i], axes, dims[i], outers[i], op))

    def all_gather_bucket(
        self, xs: list[torch.Tensor], axes: Axes, dims: list[int], outers: list[int], into: dict[int, torch.Tensor] | None = None
    ) -> Any:
        """into: memory for some of the results, by place."""
        wire = self.transport(axes)
        if wire is None:
            return xs
        into = into or {}

        def packed(chosen: list[torch.Tensor], at: list[int]) -> Pending:
            flat = pack(chosen)
            rows = flat.new_empty((wire.group.size, *flat.shape))
            works = wire.gather(flat, rows)
            shapes = [x.shape for x in chosen]
            pending = Pending(works, lambda: unpack_join(rows, shapes, [dims[i] for i in at], [outers[i] for i in at]), (flat, rows))
            return _then(pending, lambda whole: [into[i].copy_(w) if i in into else w for i, w in zip(at, whole, strict=True)])

        return _bucket(wire, xs, packed, lambda i: self.all_gather(xs[i], axes, dims[i], outers[i], into.get(i)))


def _then(pending: Pending, change: Callable[[Any], Any]) -> Pending:
    """The same, its result changed."""
    finish = pending.finish
    pending.finish = lambda: change(finish())
    return pending


def _bucket(
    wire: DirectTransport | NativeTransport,
    xs: Sequence[torch.Tensor],
    packed: Callable[[list[torch.Tensor], list[int]], Pending],
    solo: Callable[[int], Pending],
) -> Pending:
    """Many tensors: small ones in one message, made by `packed` of them and their places; each large one by `solo` of its place."""
    large = [i for i, x in enumerate(xs) if x.numel() * x.element_size() >= wire.SOLO_BYTES]
    small = [i for i in range(len(xs)) if i not in set(large)]
    parts = [(([i]), solo(i)) for i in large]
    if small:
        parts.append((small, packed([xs[i] for i in small], small)))

    def finish() -> list[torch.Tensor]:
        out: dict[int, torch.Tensor] = {}
        for (places, part), alone in zip(parts, [True] * len(large) + [False], strict=False):
            result = part.finish()
            out |= dict(zip(places, [result] if alone else result, strict=True))
            part.held = ()
        return [out[i] for i in range(len(xs))]

    works = [work for _, part in parts for work in part.works]
    return Pending(works, finish, [tensor for _, part in parts for tensor in part.held])


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
