"""How a cut tensor is shown to the outside: as a DTensor, whose layouts know only contiguous slices of whole dims.

A cut of a dim's outermost factor is such a slice and is shown as it is. A cut of an inner factor (heads inside a fused QKV weight)
is not: its axis is moved to another dim by an all-to-all, or gathered where no other dim can take it. `Exposure` says how, and how back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .collectives import take_shard, wait
from .communicator import Communicator
from .sharding import ShardSpec, Split


@dataclass(frozen=True, slots=True)
class Move:
    """One axis leaves the factor it cuts: (dim, outer) as in `collectives`. to_dim: the dim it cuts instead, None where it is gathered."""

    axis: int
    dim: int
    outer: int
    to_dim: int | None


@dataclass(frozen=True, slots=True)
class Exposure:
    """moves: collectives on the way out, in order. dims: for each mesh axis the dim it then slices, None where replicated."""

    moves: tuple[Move, ...]
    dims: tuple[int | None, ...]

    def out(self, x: torch.Tensor, communicator: Communicator) -> torch.Tensor:
        """The piece as it is shown; `x` itself where nothing has to move. All ranks of the mesh call it."""
        for move in self.moves:
            if move.to_dim is None:
                x = wait(communicator.all_gather(x, (move.axis,), move.dim, move.outer))
            else:
                x = wait(communicator.all_to_all(x, (move.axis,), move.to_dim, 1, move.dim, move.outer))
        return x

    def back(self, x: torch.Tensor, communicator: Communicator, mesh: tuple[int, ...]) -> torch.Tensor:
        """Inverse of `out`."""
        for move in reversed(self.moves):
            if move.to_dim is None:
                x = take_shard(x, communicator.groups.coords, (move.axis,), (mesh[move.axis],), move.dim, move.outer)
            else:
                x = wait(communicator.all_to_all(x, (move.axis,), move.dim, move.outer, move.to_dim, 1))
        return x


def exposure_of(spec: ShardSpec) -> Exposure:
    """The way out of a layout. The layout must not be partial."""
    assert not spec.is_partial, f"a stored tensor cannot be partial: {spec}"
    moves: list[Move] = []
    while hidden := [axis for axis in range(len(spec.mesh)) if not _is_slice(spec, axis)]:
        entry = spec.axes[hidden[-1]]
        # Axes on one factor nest: the innermost leaves first.
        axis = max(other for other in range(len(spec.mesh)) if spec.axes[other] == entry)
        move, spec = _leave(spec, axis)
        moves.append(move)
    return Exposure(tuple(moves), tuple(entry[0] if isinstance(entry, tuple) else None for entry in spec.axes))


def outer_size(spec: ShardSpec, split: Split) -> int:
    """Product of the local sizes of the dim's more major factors."""
    dim, index = split
    return math.prod(spec.local_factors()[dim][:index])


def full_tensor(x: torch.Tensor, spec: ShardSpec, communicator: Communicator) -> torch.Tensor:
    """The whole tensor, on every rank; `x` itself where it is not cut. All ranks of the mesh call it."""
    for axis in reversed(range(len(spec.mesh))):
        entry = spec.axes[axis]
        if isinstance(entry, tuple):
            x = wait(communicator.all_gather(x, (axis,), entry[0], outer_size(spec, entry)))
            spec = _with(spec, axis, None)
    return x


def _is_slice(spec: ShardSpec, axis: int) -> bool:
    """Whether the axis cuts contiguous slices of a whole dim, nested in axis order as DTensor nests them."""
    entry = spec.axes[axis]
    if not isinstance(entry, tuple):
        return True
    dim, index = entry
    if outer_size(spec, entry) != 1:
        return False
    return not any(isinstance(e, tuple) and e[0] == dim and e[1] < index for e in spec.axes[axis + 1 :])


def _leave(spec: ShardSpec, axis: int) -> tuple[Move, ShardSpec]:
    entry = spec.axes[axis]
    assert isinstance(entry, tuple), f"axis {axis} cuts nothing in {spec}"
    target = _free_slice(spec, axis)
    move = Move(axis, entry[0], outer_size(spec, entry), None if target is None else target[0])
    return move, _with(spec, axis, target)


def _free_slice(spec: ShardSpec, axis: int) -> Split | None:
    """A dim that no axis cuts and whose outermost factor this axis can."""
    taken = {entry[0] for entry in spec.axes if isinstance(entry, tuple)}
    for dim, parts in enumerate(spec.factors):
        first = next((i for i, size in enumerate(parts) if size > 1), None)
        if dim not in taken and first is not None and parts[first] % spec.mesh[axis] == 0:
            return (dim, first)
    return None


def _with(spec: ShardSpec, axis: int, entry: Split | None) -> ShardSpec:
    return replace(spec, axes=(*spec.axes[:axis], entry, *spec.axes[axis + 1 :]))
