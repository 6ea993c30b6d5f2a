"""The collectives of one rank: what an executor binds to the names in `collectives`.

Three layers. A `Communicator` has one method per collective and knows layouts: what is cut, packed and put together, and which memory that
takes. A transport turns one tensor's exchange into messages: directly from device to device (gloo), or as one of the backend's own
collectives (NCCL). A wire carries the messages: those of a process group, or, for memory accounts on paper, none at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .. import torch_compat
from .collectives import STARTS, Axes, Pending, combine, cut, cut_shape, join, outer_after_cut, pack, pack_cut, unpack, unpack_join

if TYPE_CHECKING:
    from .groups import AxisGroups, Group

_REDUCE_OP = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# ------------------------------------------------------------------------------------------------------------------------- wires


class GroupWire:
    """The messages of a process group. Each call starts one and returns the work to wait for."""

    def __init__(self, process_group: Any) -> None:
        self.group = process_group

    def send(self, x: torch.Tensor, peer: int) -> Any:
        """To a device of the group."""
        return self.group.send([x], peer, 0)

    def receive(self, into: torch.Tensor, peer: int) -> Any:
        """From a device of the group."""
        return self.group.recv([into], peer, 0)

    def all_reduce(self, x: torch.Tensor, op: str) -> Any:
        """In place."""
        return dist.all_reduce(x, _REDUCE_OP[op], group=self.group, async_op=True)

    def all_gather(self, rows: torch.Tensor, x: torch.Tensor) -> Any:
        """Everybody's `x`, side by side in `rows`; both flat."""
        return torch_compat.all_gather_single(rows, x, group=self.group, async_op=True)

    def reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor, op: str) -> Any:
        """This device's part of everybody's `rows`, combined; both flat."""
        return torch_compat.reduce_scatter_single(out, rows, _REDUCE_OP[op], group=self.group, async_op=True)

    def all_to_all(self, out: torch.Tensor, rows: torch.Tensor) -> Any:
        """Row j goes to device j."""
        return dist.all_to_all_single(out, rows, group=self.group, async_op=True)


class _Done:
    """Nothing to wait for."""

    def wait(self) -> None:
        """At once."""


class SilentWire:
    """Carries nothing: what would arrive is zeros. The tensors around it, and so the memory, are those of a real exchange."""

    def send(self, x: torch.Tensor, peer: int) -> _Done:
        """See `GroupWire`."""
        return _Done()

    def receive(self, into: torch.Tensor, peer: int) -> _Done:
        """See `GroupWire`."""
        return self._arrived(into)

    def all_reduce(self, x: torch.Tensor, op: str) -> _Done:
        """See `GroupWire`."""
        return _Done()

    def all_gather(self, rows: torch.Tensor, x: torch.Tensor) -> _Done:
        """See `GroupWire`."""
        return self._arrived(rows)

    def reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor, op: str) -> _Done:
        """See `GroupWire`."""
        return self._arrived(out)

    def all_to_all(self, out: torch.Tensor, rows: torch.Tensor) -> _Done:
        """See `GroupWire`."""
        return self._arrived(out)

    def _arrived(self, into: torch.Tensor) -> _Done:
        if not into.is_meta:
            into.zero_()
        return _Done()


Wire = GroupWire | SilentWire

# -------------------------------------------------------------------------------------------------------------------- transports


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

    @classmethod
    def solo_bytes(cls, kind: str, num_devices: int) -> float:
        """From how many bytes on a tensor of a bucket goes by itself. Never where gloo reduces it, which begins with a copy anyway and
        is faster with one large message: on 4 ranks of 2 cores 16 of 1 MiB at once take 26 ms, one of 16 MiB 18 ms."""
        return math.inf if cls.copies_anyway(kind, num_devices) else cls.SOLO_BYTES

    @classmethod
    def copies_anyway(cls, kind: str, num_devices: int) -> bool:
        """Whether packing takes the place of a copy that is part of the collective."""
        return kind == "all_reduce" and num_devices > 2

    def __init__(self, group: Group, wire: Wire) -> None:
        self.group = group
        self.wire = wire
        # Everybody starts with the next neighbour, so that no device is everybody's first target.
        self.peers = [(group.index + step) % group.size for step in range(1, group.size)]

    def _swap(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> list[Any]:
        """Send outgoing[j] to device j and receive incoming[j]; the own places are not looked at."""
        works = [self.wire.receive(incoming[peer], peer) for peer in self.peers]
        works += [self.wire.send(outgoing[peer], peer) for peer in self.peers]
        return works

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> list[Any]:
        """Fill `rows`, contiguous (n, *x.shape); row `index` may be `x` itself."""
        works = self._swap([x] * self.group.size, rows.unbind())
        own = rows[self.group.index]
        if not _same_memory(own, x):
            own.copy_(x)
        return works

    def exchange(self, pieces: torch.Tensor) -> tuple[list[Any], torch.Tensor, Sequence[torch.Tensor]]:
        """Row j of `pieces` goes to device j; works, the rows that arrive, and what must be held."""
        out = [piece.contiguous() for piece in pieces.unbind()]
        rows = pieces.new_empty(pieces.shape)
        works = self._swap(out, rows.unbind())
        rows[self.group.index].copy_(out[self.group.index])
        return works, rows, out

    def all_reduce(self, x: torch.Tensor, op: str, scratch: bool = False) -> Pending:
        """Combine `x` (contiguous) over the group; `x` stays as it is unless it is `scratch`."""
        if self.group.size > 2 and x.numel() * x.element_size() > self.RING_BYTES:
            return _native_all_reduce(self.wire, x, op, scratch)
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


def _native_all_reduce(wire: Wire, x: torch.Tensor, op: str, scratch: bool) -> Pending:
    out = x if scratch else x.clone(memory_format=torch.contiguous_format)
    return Pending((wire.all_reduce(out, op),), lambda: out, (out,))


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same elements; not by address, which tensors without data do not have."""
    same = torch_compat.storage_identity(a.untyped_storage()) == torch_compat.storage_identity(b.untyped_storage())
    return same and a.storage_offset() == b.storage_offset()


class NativeTransport:
    """The backend's own collectives; for NCCL."""

    @classmethod
    def solo_bytes(cls, kind: str, num_devices: int) -> float:
        """All tensors of a bucket go in one message."""
        return math.inf

    @classmethod
    def copies_anyway(cls, kind: str, num_devices: int) -> bool:
        """See `DirectTransport`: what formulas say of a collective has no copy in it."""
        return False

    def __init__(self, group: Group, wire: Wire) -> None:
        self.group = group
        self.wire = wire

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> list[Any]:
        """Fill `rows`, contiguous (n, *x.shape); row `index` may be `x` itself."""
        return [self.wire.all_gather(rows.view(-1), x.view(-1))]

    def exchange(self, pieces: torch.Tensor) -> tuple[list[Any], torch.Tensor, Sequence[torch.Tensor]]:
        """Row j of `pieces` goes to device j; works, the rows that arrive, and what must be held."""
        out = pieces.contiguous()
        rows = torch.empty_like(out)
        return [self.wire.all_to_all(rows, out)], rows, (out,)

    def all_reduce(self, x: torch.Tensor, op: str, scratch: bool = False) -> Pending:
        """Combine `x` over the group; `x` stays as it is unless it is `scratch`."""
        return _native_all_reduce(self.wire, x, op, scratch)

    def reduce_scatter(self, pieces: torch.Tensor, op: str) -> Pending:
        """Combine row `index` of every device's `pieces`."""
        whole = pieces.contiguous()
        out = whole.new_empty(whole.shape[1:])
        return Pending((self.wire.reduce_scatter(out.view(-1), whole.view(-1), op),), lambda: out, (whole, out))


# ------------------------------------------------------------------------------------------------------------------ communicator


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
            wire = GroupWire(group.process_group) if self.groups.connected else SilentWire()
            self._transports[key] = self._kind(group, wire) if group.size > 1 else None
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
            pending = wire.all_reduce(pack(chosen), op, scratch=True)
            return _then(pending, lambda flat: unpack(flat, [x.shape for x in chosen]))

        return _bucket(wire, "all_reduce", xs, packed, lambda i: self.all_reduce(xs[i], axes, op))

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

        return _bucket(wire, "reduce_scatter", xs, packed, lambda i: self.reduce_scatter(xs[i], axes, dims[i], outers[i], op))

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

        return _bucket(wire, "all_gather", xs, packed, lambda i: self.all_gather(xs[i], axes, dims[i], outers[i], into.get(i)))


def _then(pending: Pending, change: Callable[[Any], Any]) -> Pending:
    """The same, its result changed."""
    finish = pending.finish
    pending.finish = lambda: change(finish())
    return pending


def _bucket(
    wire: DirectTransport | NativeTransport,
    kind: str,
    xs: Sequence[torch.Tensor],
    packed: Callable[[list[torch.Tensor], list[int]], Pending],
    solo: Callable[[int], Pending],
) -> Pending:
    """Many tensors: small ones in one message, made by `packed` of them and their places; each large one by `solo` of its place."""
    alone_from = wire.solo_bytes(kind, wire.group.size)
    large = [i for i, x in enumerate(xs) if x.numel() * x.element_size() >= alone_from]
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
